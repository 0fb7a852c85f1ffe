package rpc

import (
	"encoding/json"
	"fmt"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Limits of findings that ParseFindings reads.
const (
	MaxFindings      = 1 << 20 // bytes
	maxFound         = 1000
	maxFindingLength = 4096 // bytes of each text of a finding
)

// ParseFindings reads what "umbp-plugin-X examine" has printed: a JSON list of findings. It is untrusted. Fields that are
// not known are ignored.
func ParseFindings(text []byte) ([]backend.Finding, error) {
	fault := func(format string, args ...any) ([]backend.Finding, error) {
		return nil, fmt.Errorf("not a plugin's findings: "+format, args...)
	}
	if len(text) > MaxFindings {
		return fault("%d bytes are more than %d", len(text), MaxFindings)
	}
	var findings []backend.Finding
	if err := json.Unmarshal(text, &findings); err != nil {
		return fault("%w", err)
	}
	if len(findings) > maxFound {
		return fault("there are %d", len(findings))
	}
	for i, f := range findings {
		if f.Subject == "" || len(f.Subject) > maxFindingLength || len(f.Text) > maxFindingLength || len(f.Remedy) > maxFindingLength {
			return fault("number %d has no subject, or is too long", i)
		}
	}
	return findings, nil
}
