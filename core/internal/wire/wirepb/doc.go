// Package wirepb is the generated code of wire.proto: what the messages of the control plane have in common.
package wirepb
