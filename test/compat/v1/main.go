// Command v1 is a plugin that speaks version 1 of the plugin protocol, as the first that were shipped did. It stands
// for all plugins that operators have and nobody builds anew: what is in this folder is not changed, and imports nothing
// of the project, not even the generated code. When a test with it fails, the host has broken the protocol.
//
// It is a small backend over Unix sockets. The options choose the data path and the way to memory, so that every part of
// the protocol is used: queues and stream, mapped memory and messages.
package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"

	"github.com/umbp/umbp/test/compat/v1/backendpb"
)

const description = `{
  "name": "compat-v1",
  "version": "1",
  "protocol_versions": [1],
  "options": [
    {"name": "path", "type": "string", "default": "queues", "choices": ["queues", "stream"], "help": "How transfers come."},
    {"name": "memory", "type": "string", "default": "mapped", "choices": ["mapped", "messages"], "help": "How memory is reached."},
    {"name": "unused", "type": "duration", "default": "1s", "min": "1ms", "max": "1h"}
  ]
}`

func main() {
	switch {
	case len(os.Args) == 2 && os.Args[1] == "describe":
		fmt.Println(description)
	case len(os.Args) == 2 && os.Args[1] == "descriptor": // for the test that compares protocols
		text, err := proto.Marshal(protodesc.ToFileDescriptorProto(backendpb.File_test_compat_v1_backendpb_backend_proto))
		must(err)
		_, err = os.Stdout.Write(text)
		must(err)
	case os.Getenv("UMBP_BACKEND_PLUGIN") != "3d1f0c6f-8f7e-4f3c-9a52-1c6c2a5b7d10":
		fmt.Fprintln(os.Stderr, "this is a plugin of umbp, which starts it")
		os.Exit(2)
	default:
		must(serve())
	}
}

// must ends the process when something is wrong with it, or with the host.
func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "compat-v1:", err)
		os.Exit(1)
	}
}

func serve() error {
	fd, err := strconv.Atoi(os.Getenv("UMBP_PLUGIN_PASSAGE_FD"))
	if err != nil {
		return fmt.Errorf("no passage: %w", err)
	}
	unix.CloseOnExec(fd)
	s := &service{passage: newPassage(fd), closed: make(chan struct{}), unwatched: make(chan struct{})}
	go s.passage.receive()
	path := filepath.Join(os.Getenv("PLUGIN_UNIX_SOCKET_DIR"), "compat-"+strconv.Itoa(os.Getpid()))
	listener, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	backendpb.RegisterBackendServer(server, s)
	healthy := health.NewServer()
	healthy.SetServingStatus("plugin", grpc_health_v1.HealthCheckResponse_SERVING)
	grpc_health_v1.RegisterHealthServer(server, healthy)
	go func() {
		<-s.closed
		select { // what is on its way to the host arrives
		case <-s.unwatched:
		case <-time.After(time.Second):
		}
		time.Sleep(20 * time.Millisecond)
		os.Exit(0)
	}()
	fmt.Printf("1|1|unix|%s|grpc\n", path)
	return server.Serve(listener)
}

// passage brings descriptors. Calls and messages may come in any order.
type passage struct {
	conn *os.File

	mu      sync.Mutex
	arrived sync.Cond
	files   map[uint64][]int
}

func newPassage(fd int) *passage {
	p := &passage{conn: os.NewFile(uintptr(fd), "passage"), files: map[uint64][]int{}}
	p.arrived.L = &p.mu
	return p
}

// receive takes messages until the host ends, and the process with it.
func (p *passage) receive() {
	for {
		message, control := make([]byte, 16), make([]byte, unix.CmsgSpace(8*4))
		n, controlLength, _, _, err := unix.Recvmsg(int(p.conn.Fd()), message, control, unix.MSG_CMSG_CLOEXEC)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case n == 0 || errors.Is(err, unix.ECONNRESET):
			os.Exit(0)
		case err != nil || n != 16 || order.Uint32(message) != 0x50424d55:
			must(fmt.Errorf("passage: %d bytes, %v", n, err))
		}
		headers, err := unix.ParseSocketControlMessage(control[:controlLength])
		must(err)
		var files []int
		for _, h := range headers {
			fds, err := unix.ParseUnixRights(&h)
			must(err)
			files = append(files, fds...)
		}
		if int(order.Uint32(message[4:])) != len(files) {
			must(errors.New("passage: another number of descriptors than the message says"))
		}
		p.mu.Lock()
		p.files[order.Uint64(message[8:])] = files
		p.arrived.Broadcast()
		p.mu.Unlock()
	}
}

// take waits for the message of a tag.
func (p *passage) take(tag uint64, count int) ([]int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.files[tag] == nil {
		p.arrived.Wait()
	}
	files := p.files[tag]
	delete(p.files, tag)
	if len(files) != count {
		return nil, fmt.Errorf("%d descriptors, want %d", len(files), count)
	}
	return files, nil
}

// readFull reads into several slices, one after the other.
func readFull(r io.Reader, parts ...[]byte) error {
	for _, p := range parts {
		if _, err := io.ReadFull(r, p); err != nil {
			return err
		}
	}
	return nil
}
