package main

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"syscall"

	"github.com/umbp/umbp/config"
	"github.com/umbp/umbp/core"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// The exit codes. Scripts may rely on them.
const (
	exitOK      = 0
	exitFailure = 1 // anything that has no code of its own
	exitUsage   = 2 // a wrong command line or configuration
	exitMissing = 3 // the pool does not hold a key
	exitNoRoom  = 4 // no node has room, or a queue is full: try again later, or add memory
	exitInDoubt = 5 // a put was not confirmed: it may or may not have happened
)

const exitHelp = `Exit codes:
  0  done
  1  failed
  2  wrong command line or configuration
  3  a key is not in the pool
  4  no room, or busy: the same call may succeed later
  5  in doubt: a put was not confirmed`

// usageError is a mistake on the command line.
type usageError struct{ error }

func (e *usageError) Unwrap() error { return e.error }

// statusError is a key for which the result was not what was asked for.
type statusError struct {
	key    string
	result core.Result
}

func (e *statusError) Error() string {
	if e.result.Err != nil {
		return e.result.Err.Error()
	}
	return fmt.Sprintf("key %q is %s", e.key, e.result.Status)
}

func (e *statusError) Unwrap() error { return e.result.Err }

// nodeError is what a node says to its operator, or why it says nothing.
type nodeError struct {
	address string
	error
}

func (e *nodeError) Error() string { return fmt.Sprintf("node at %s: %v", e.address, e.error) }

func (e *nodeError) Unwrap() error { return e.error }

func exitCode(err error) int {
	var status *statusError
	var faults config.Faults
	var usage *usageError
	switch {
	case errors.As(err, &usage), errors.As(err, &faults):
		return exitUsage
	case errors.As(err, &status):
		switch status.result.Status {
		case core.Missing:
			return exitMissing
		case core.NoSpace, core.Busy:
			return exitNoRoom
		case core.InDoubt:
			return exitInDoubt
		}
	}
	switch backend.CodeOf(err) {
	case backend.BadRequest: // such as a key that is too long, or given twice
		return exitUsage
	case backend.Busy:
		return exitNoRoom
	}
	return exitFailure
}

// printError prints an error and, where the way out is known, a hint.
func printError(w io.Writer, err error) {
	for _, line := range strings.Split(strings.TrimRight(err.Error(), "\n"), "\n") {
		fmt.Fprintln(w, "umbp: error:", line)
	}
	if hint := hintFor(err); hint != "" {
		fmt.Fprintln(w, "umbp: hint:", hint)
	}
}

func hintFor(err error) string {
	var status *statusError
	var faults config.Faults
	var node *nodeError
	switch {
	case errors.As(err, &node) && backend.CodeOf(err) == backend.PathDown:
		return fmt.Sprintf(`is a node running there, and does it use TLS? "umbp backends --node %s" shows what it says of its backends`, node.address)
	case errors.As(err, &faults):
		return `"umbp config default" prints every key with its meaning`
	case errors.Is(err, syscall.EADDRINUSE):
		return `another process has the address; is a node running already? Choose another with --node.listen, or --node.http; port 0 takes any free port`
	case errors.As(err, &status) && status.result.Status == core.Missing:
		return `"umbp ls" lists the keys of the pool`
	case errors.As(err, &status) && status.result.Status == core.InDoubt:
		return fmt.Sprintf(`"umbp stat %s" tells, once the node answers, whether the value is there; putting it again is harmless`, status.key)
	}
	switch backend.CodeOf(err) {
	case backend.PathDown:
		return `is a directory running there, and does it use TLS? "umbp serve" starts one, --directory.address says where it is, and --tls.cert, --tls.key and --tls.ca say who you are`
	case backend.Integrity:
		return "the value is damaged or was replaced while it was read; remove it, or get it again"
	}
	return ""
}
