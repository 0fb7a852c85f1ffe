package conformance_test

import (
	"errors"
	"io/fs"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/umbp/umbp/plugin-sdk/conformance"
)

// TestRules: every case tries a rule that there is, and every rule is tried.
func TestRules(t *testing.T) {
	tried := map[string]bool{}
	names := map[string]bool{}
	for _, c := range conformance.Cases() {
		if names[c.Name] {
			t.Errorf("two cases are called %q", c.Name)
		}
		names[c.Name], tried[c.Rule] = true, true
	}
	id := regexp.MustCompile(`^[a-z]+(-[a-z]+)*$`)
	for _, rule := range conformance.Rules() {
		if !tried[rule.ID] {
			t.Errorf("no case tries the rule %q, or there are two of the name", rule.ID)
		}
		delete(tried, rule.ID)
		if !id.MatchString(rule.ID) || !strings.HasSuffix(rule.Text, ".") {
			t.Errorf("the rule %q is not well-formed: %q", rule.ID, rule.Text)
		}
	}
	for rule := range tried {
		t.Errorf("a case tries %q, which is no rule", rule)
	}
}

// TestGuideHasTheRules: the guide for authors explains every rule under its id.
func TestGuideHasTheRules(t *testing.T) {
	guide, err := os.ReadFile("../../docs/BACKEND_GUIDE.md")
	if errors.Is(err, fs.ErrNotExist) {
		t.Skip("there is no guide yet")
	} else if err != nil {
		t.Fatal(err)
	}
	for _, rule := range conformance.Rules() {
		if !strings.Contains(string(guide), "`"+rule.ID+"`") {
			t.Errorf("the guide says nothing of the rule `%s`: %s", rule.ID, rule.Text)
		}
	}
}
