package shm

import (
	"bytes"
	"errors"
	"io"
	"testing"
)

// TestTwoProcesses sends records of all lengths to another process and back, many at a time.
func TestTwoProcesses(t *testing.T) {
	const records = 3000
	there, back, files := queues(t, 16<<10)
	startChild(t, echo, files...)
	sent := make(chan error, 1)
	go func() {
		for i := range records {
			if err := sendPatiently(there, filled(1+i*7%5000, byte(i))); err != nil {
				sent <- err
				return
			}
		}
		sent <- nil
	}()
	var room []byte
	for i := range records {
		var err error
		room, err = back.Receive(room)
		must(t, err)
		if !bytes.Equal(room, filled(1+i*7%5000, byte(i))) {
			t.Fatalf("record %d comes back as another", i)
		}
	}
	must(t, <-sent)
}

// TestKilled kills a process, and asks which records it can have acted on.
func TestKilled(t *testing.T) {
	there, back, files := queues(t, MinCapacity)
	cmd, passage := startChild(t, greedy, files...)
	var positions []uint64
	for i := range 5 {
		position, err := there.Send([]byte{byte(i)})
		must(t, err)
		positions = append(positions, position)
	}
	for range 3 {
		_, err := back.Receive(nil)
		must(t, err)
	}
	must(t, cmd.Process.Kill())
	if _, _, err := passage.Receive(); err != io.EOF {
		t.Errorf("the passage to a process that is dead: %v", err)
	}
	cmd.Wait()
	for i, position := range positions {
		if there.Taken(position) != (i < 3) {
			t.Errorf("record %d: taken %v", i, i >= 3)
		}
	}
}

// TestRubbish: a process that spoils the queues is found out at once, in both directions.
func TestRubbish(t *testing.T) {
	there, back, files := queues(t, MinCapacity)
	position, err := there.Send(make([]byte, MinCapacity-lengthSize))
	must(t, err)
	startChild(t, rubbish, files...)
	for range 2 {
		if _, err := back.Receive(nil); !errors.Is(err, ErrCorrupt) {
			t.Fatalf("Receive: %v", err)
		}
	}
	if _, err := there.Send([]byte{1}); !errors.Is(err, ErrCorrupt) {
		t.Errorf("Send: %v", err)
	}
	if !there.Taken(position) {
		t.Error("of a corrupt queue a record counts as not taken")
	}
}
