package shm

import (
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// passage returns both ends.
func passage(t testing.TB) (host, plugin *Passage) {
	t.Helper()
	host, file, err := NewPassage()
	must(t, err)
	plugin, err = OpenPassage(file)
	must(t, err)
	t.Cleanup(func() { must(t, errors.Join(host.Close(), plugin.Close())) })
	return host, plugin
}

func TestPassage(t *testing.T) {
	host, plugin := passage(t)
	var files []*os.File
	for n := range MaxFiles + 1 {
		must(t, host.Send(uint64(n)<<60|7, files...))
		f := eventfd(t)
		defer f.Close()
		// The count tells which one it is.
		_, err := f.Write([]byte{byte(n + 1), 0, 0, 0, 0, 0, 0, 0})
		must(t, err)
		files = append(files, f)
	}
	if err := host.Send(1, files...); err == nil || !strings.Contains(err.Error(), "9 are more than the 8") {
		t.Errorf("too many files: %v", err)
	}
	for n := range MaxFiles + 1 {
		tag, got, err := plugin.Receive()
		must(t, err)
		if tag != uint64(n)<<60|7 || len(got) != n {
			t.Fatalf("message %d: tag %#x, %d files", n, tag, len(got))
		}
		if n == MaxFiles {
			for i, f := range got {
				if count := wakesOf(t, f); count != uint64(i+1) {
					t.Errorf("file %d is file %d", i, count-1)
				}
			}
		}
		for _, f := range got {
			flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0)
			if err != nil || flags&unix.FD_CLOEXEC == 0 {
				t.Errorf("a file would be inherited: flags %#x, %v", flags, err)
			}
			must(t, f.Close())
		}
	}
	must(t, plugin.Send(5)) // both ways
	tag, _, err := host.Receive()
	must(t, err)
	if tag != 5 {
		t.Errorf("tag %d", tag)
	}
}

func TestPassageEnds(t *testing.T) {
	host, plugin := passage(t)
	must(t, host.Send(1)) // what is never received does not hide the end
	ended := make(chan error)
	go func() {
		_, _, err := host.Receive()
		ended <- err
	}()
	must(t, plugin.Close())
	must(t, plugin.Close())
	if err := <-ended; err != io.EOF {
		t.Errorf("the other end was closed: %v", err)
	}
	if err := host.Send(2); err == nil {
		t.Error("a message to nobody is accepted")
	}

	host, _ = passage(t)
	go func() {
		_, _, err := host.Receive()
		ended <- err
	}()
	must(t, host.Close())
	if err := <-ended; !errors.Is(err, net.ErrClosed) {
		t.Errorf("this end was closed: %v", err)
	}
}

func TestPassageRefuses(t *testing.T) {
	good := []byte("UMBP\x01\x00\x00\x00tag tag ")
	spare := eventfd(t)
	defer spare.Close()
	fd := int(spare.Fd())
	for what, c := range map[string]struct {
		message []byte
		files   int
		want    string
	}{
		"good":              {good, 1, ""},
		"no file":           {good, 0, "0 of 1 descriptors"},
		"two files":         {good, 2, "2 of 1 descriptors"},
		"nine files":        {good, 9, "8 of 1 descriptors"},
		"another magic":     {append([]byte("UMBQ"), good[4:]...), 1, "malformed"},
		"a byte too few":    {good[:15], 1, "malformed"},
		"a byte too many":   {append(good[:16:16], 0), 1, "malformed"},
		"an absurd count":   {[]byte("UMBP\xff\xff\xff\xfftag tag "), 1, "1 of 4294967295 descriptors"},
		"one byte, no more": {[]byte{0}, 1, "malformed"},
	} {
		t.Run(what, func(t *testing.T) {
			host, file, err := NewPassage()
			must(t, err)
			defer host.Close()
			defer file.Close()
			var fds []int
			for range c.files {
				fds = append(fds, fd)
			}
			before := held(t)
			must(t, unix.Sendmsg(int(file.Fd()), c.message, unix.UnixRights(fds...), nil, 0))
			_, files, err := host.Receive()
			if c.want == "" {
				must(t, err)
				must(t, files[0].Close())
			} else if err == nil || !strings.Contains(err.Error(), c.want) || files != nil {
				t.Errorf("got %v, want an error that says %q", err, c.want)
			}
			if after := held(t); after.leak(before) {
				t.Errorf("before: %+v, after: %+v", before, after)
			}
		})
	}
}

func TestOpenPassageRefuses(t *testing.T) {
	before := held(t)
	if _, err := OpenPassage(eventfd(t)); err == nil {
		t.Error("an eventfd is accepted")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	f, err := l.(*net.TCPListener).File()
	must(t, err)
	must(t, l.Close())
	if _, err := OpenPassage(f); err == nil {
		t.Error("a listener is accepted")
	}
	if after := held(t); after.files > before.files+2 { // the poller's own two
		t.Errorf("before: %+v, after: %+v", before, after)
	}
}
