package backend_test

import (
	"encoding/json"
	"testing"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

func TestFindingStates(t *testing.T) {
	for state, word := range map[backend.FindingState]string{
		backend.Fine: `"fine"`, backend.Warning: `"warning"`, backend.Problem: `"problem"`,
	} {
		text, err := json.Marshal(state)
		if err != nil || string(text) != word {
			t.Errorf("%v is written as %s, %v", state, text, err)
		}
		var read backend.FindingState
		if err := json.Unmarshal([]byte(word), &read); err != nil || read != state {
			t.Errorf("%s is read as %v, %v", word, read, err)
		}
	}
	var read backend.FindingState
	if err := json.Unmarshal([]byte(`"excellent"`), &read); err == nil {
		t.Errorf("a state that does not exist is read as %v", read)
	}
}
