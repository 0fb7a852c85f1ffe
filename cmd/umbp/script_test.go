package main

import (
	"bytes"
	"compress/gzip"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/umbp/umbp/config"
	"github.com/umbp/umbp/plugin-sdk/gpu/gpusim"
	"github.com/umbp/umbp/plugin-sdk/null"
	"github.com/umbp/umbp/plugin-sdk/serve"
	"github.com/umbp/umbp/plugins/rdma"
	"github.com/umbp/umbp/plugins/rdma/device"
	"github.com/umbp/umbp/plugins/shm"
	"github.com/umbp/umbp/plugins/tcp"
	"github.com/umbp/umbp/plugins/xgmi"
)

// The scripts in testdata/script use umbp as a user does. The test binary acts as two programs for them:
//
//	umbp ARG...         the real thing
//	node NAME ARG...    umbp serve on free ports, its log in NAME.log; to be run in the background as &NAME&
//
// and as the plugins that umbp is shipped with, of which rdma finds no devices, and as umbp-plugin-broken, which breaks
// the contract. $GPUS is the runtime of a simulated machine with three GPUs: each reaches the next one, and the first and
// the last do not reach each other.
//
// Nodes stay members of their directory without a sign of life for ten minutes, unless a script says otherwise: the machine
// may be so busy that they stand still for seconds.
func TestMain(m *testing.M) {
	const lease = "UMBP_DIRECTORY__LEASE"
	if os.Getenv(lease) == "" {
		os.Setenv(lease, "10m")
	}
	testscript.Main(m, map[string]func(){
		"umbp": main, "node": nodeMain,
		"umbp-plugin-shm":  func() { serve.Main(shm.Factory) },
		"umbp-plugin-tcp":  func() { serve.Main(tcp.Factory) },
		"umbp-plugin-xgmi": func() { serve.Main(xgmi.Factory) },
		"umbp-plugin-null": func() { serve.Main(null.Factory) },

		"umbp-plugin-rdma": func() { serve.Main(rdma.Factory(noDevices{})) },

		"umbp-plugin-broken": brokenPluginMain,
	})
}

// noDevices is a host without devices for RDMA, whatever this one has.
type noDevices struct{ device.Library }

func (noDevices) Name() string      { return "libnothing.so.1" }
func (noDevices) Simulated() bool   { return false }
func (noDevices) Fork() device.Fork { return device.ForkUnneeded }
func (noDevices) Devices() ([]string, error) {
	return nil, &device.Missing{What: "there are no devices", Remedy: "build one in"}
}

func nodeMain() {
	name := os.Args[1]
	log, err := os.Create(name + ".log")
	if err != nil {
		panic(err)
	}
	args := []string{
		"serve", "--node.name", name, "--node.listen", "127.0.0.1:0", "--node.http", "127.0.0.1:0", "--pool.size", "4MiB",
	}
	os.Exit(run(append(args, os.Args[2:]...), os.Stdin, os.Stdout, log))
}

// TestScripts runs all scripts with the backends linked in, and those that move values with each as a process of its
// own.
func TestScripts(t *testing.T) {
	plugins := pluginFolder(t)
	t.Run(config.InProcess, func(t *testing.T) {
		runScripts(t, plugins, testscript.Params{Dir: "testdata/script"})
	})
	t.Run(config.AsProcess, func(t *testing.T) {
		var files []string
		for _, name := range []string{"cluster", "faults", "reload", "replay", "tls", "values", "xgmi", "xgmi-stall"} {
			files = append(files, filepath.Join("testdata", "script", name+".txtar"))
		}
		runScripts(t, plugins, testscript.Params{Files: files}, "UMBP_PLUGINS__MODE="+config.AsProcess)
	})
}

// A program under the race detector sleeps for a second before it exits, unless this variable tells it not to.
const quickExit = "GORACE=atexit_sleep_ms=0"

// pluginFolder makes a folder of plugins that exit quickly.
func pluginFolder(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"shm", "tcp", "xgmi", "null", "broken", "rdma"} {
		name = "umbp-plugin-" + name
		program, err := exec.LookPath(name)
		if err != nil {
			t.Fatal(err)
		}
		script := fmt.Sprintf("#!/bin/sh\n%s exec %s \"$@\"\n", quickExit, program)
		if err := os.WriteFile(filepath.Join(dir, name), []byte(script), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func runScripts(t *testing.T, plugins string, p testscript.Params, env ...string) {
	p.RequireUniqueNames = true
	p.Setup = func(e *testscript.Env) error {
		gpus := gpusim.New(t, gpusim.Machine{
			Devices: make([]gpusim.Device, 3),
			Links:   []gpusim.Link{{From: 0, To: 1}, {From: 1, To: 0}, {From: 1, To: 2, PCIe: true}, {From: 2, To: 1, PCIe: true}},
		})
		e.Values[simulatedGPUs{}] = gpus
		e.Vars = append(e.Vars, append(env, quickExit, "UMBP_PLUGINS__DIR="+plugins, "GPUS="+gpus.Library)...)
		return nil
	}
	p.Cmds = map[string]func(*testscript.TestScript, bool, []string){
		"exits":  scriptExits,
		"until":  scriptUntil,
		"ready":  scriptReady,
		"logs":   scriptLogs,
		"signal": scriptSignal,
		"shape":  scriptShape,
		"fetch":  scriptFetch,
		"random": scriptRandom,
		"expand": scriptExpand,
		"gzip":   scriptGzip,
		"certs":  scriptCerts,
		"slay":   scriptSlay,
		"stall":  scriptStall,
		"gone":   scriptGone,
	}
	testscript.Run(t, p)
}

// simulatedGPUs is the key of a script's own.
type simulatedGPUs struct{}

// stall: lets no copy of the simulated GPUs come to its end; ! stall: lets them go on.
func scriptStall(ts *testscript.TestScript, neg bool, _ []string) {
	gpus := ts.Value(simulatedGPUs{}).(*gpusim.Sim)
	if neg {
		gpus.SetFaults()
	} else {
		gpus.SetFaults(gpusim.Fault{Effect: gpusim.Stall})
	}
}

// patienceOfScripts is how long scripts wait for what must come. Nothing is asserted about time.
const patienceOfScripts = time.Minute

// await calls f until it is true.
func await(ts *testscript.TestScript, what string, f func() bool) {
	for deadline := time.Now().Add(patienceOfScripts); !f(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			ts.Fatalf("never came: %s", what)
		}
	}
}

// exits CODE CMD ARG...: runs a command that must exit with the code.
func scriptExits(ts *testscript.TestScript, _ bool, args []string) {
	code := 0
	var exit *exec.ExitError
	if err := ts.Exec(args[1], args[2:]...); errors.As(err, &exit) {
		code = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if strconv.Itoa(code) != args[0] {
		ts.Fatalf("exit code %d, want %s", code, args[0])
	}
}

// until REGEXP CMD ARG...: runs a command until its output matches.
func scriptUntil(ts *testscript.TestScript, _ bool, args []string) {
	want := regexp.MustCompile("(?m)" + args[0])
	await(ts, args[0], func() bool {
		_ = ts.Exec(args[1], args[2:]...) // it may fail on the way
		return want.MatchString(ts.ReadFile("stdout") + ts.ReadFile("stderr"))
	})
}

func nodeLog(ts *testscript.TestScript, name string) string {
	log, _ := os.ReadFile(ts.MkAbs(name + ".log")) // not there yet is as good as empty
	return string(log)
}

var (
	readyLine = regexp.MustCompile(`umbp: ready: control=(\S+) .*http=(\S+)`)
	endedLine = regexp.MustCompile(`(?m)^umbp: error: .*`)
)

// ready NAME...: waits for nodes, and sets $NAME to the address of the control plane and $NAME_http to that of
// the metrics.
func scriptReady(ts *testscript.TestScript, _ bool, names []string) {
	for _, name := range names {
		await(ts, name+" is ready", func() bool {
			log := nodeLog(ts, name)
			if end := endedLine.FindString(log); end != "" {
				ts.Fatalf("%s ended: %s", name, end)
			}
			m := readyLine.FindStringSubmatch(log)
			if m != nil {
				ts.Setenv(name, m[1])
				ts.Setenv(name+"_http", m[2])
			}
			return m != nil
		})
	}
}

// logs NAME REGEXP: waits until a node has logged something.
func scriptLogs(ts *testscript.TestScript, _ bool, args []string) {
	want := regexp.MustCompile("(?m)" + args[1])
	await(ts, fmt.Sprintf("%s logs %s", args[0], args[1]), func() bool { return want.MatchString(nodeLog(ts, args[0])) })
}

// signal SIGNAL NAME: sends a signal to a node.
func scriptSignal(ts *testscript.TestScript, _ bool, args []string) {
	signals := map[string]os.Signal{"HUP": syscall.SIGHUP, "TERM": syscall.SIGTERM, "KILL": syscall.SIGKILL}
	for _, cmd := range ts.BackgroundCmds() {
		if filepath.Base(cmd.Path) == "node" && cmd.Args[1] == args[1] {
			ts.Check(cmd.Process.Signal(signals[args[0]]))
			return
		}
	}
	ts.Fatalf("no node %s runs", args[1])
}

// shape: turns the JSON of the last output into its field names and types, a line for each.
func scriptShape(ts *testscript.TestScript, _ bool, _ []string) {
	decoder := json.NewDecoder(strings.NewReader(ts.ReadFile("stdout")))
	var v any
	ts.Check(decoder.Decode(&v))
	if _, err := decoder.Token(); err != io.EOF {
		ts.Fatalf("something follows the JSON")
	}
	lines := map[string]bool{}
	var walk func(path string, v any)
	walk = func(path string, v any) {
		switch v := v.(type) {
		case map[string]any:
			for name, field := range v {
				walk(path+"."+name, field)
			}
		case []any:
			for _, element := range v {
				walk(path+"[]", element)
			}
		default:
			lines[fmt.Sprintf("%s %T\n", path, v)] = true
		}
	}
	walk("", v)
	for _, line := range slices.Sorted(maps.Keys(lines)) {
		fmt.Fprint(ts.Stdout(), line)
	}
}

// [!] fetch URL: gets a page, which must (or must not) be there.
func scriptFetch(ts *testscript.TestScript, neg bool, args []string) {
	client := http.Client{Timeout: patienceOfScripts}
	reply, err := client.Get(args[0])
	ts.Check(err)
	defer reply.Body.Close()
	body, err := io.ReadAll(reply.Body)
	ts.Check(err)
	if (reply.StatusCode == http.StatusOK) == neg {
		ts.Fatalf("%s: %s", args[0], reply.Status)
	}
	_, err = ts.Stdout().Write(body)
	ts.Check(err)
}

// random FILE BYTES: makes a file.
func scriptRandom(ts *testscript.TestScript, _ bool, args []string) {
	size, err := strconv.Atoi(args[1])
	ts.Check(err)
	data := make([]byte, size)
	source := mathrand.NewChaCha8([32]byte([]byte(fmt.Sprintf("%-32.32s", args[0]))))
	_, err = source.Read(data)
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), data, 0o600))
}

// expand FILE...: replaces $VARIABLE in files by its value.
func scriptExpand(ts *testscript.TestScript, _ bool, args []string) {
	for _, file := range args {
		text := os.Expand(ts.ReadFile(file), ts.Getenv)
		ts.Check(os.WriteFile(ts.MkAbs(file), []byte(text), 0o600))
	}
}

// gzip FILE: makes FILE.gz.
func scriptGzip(ts *testscript.TestScript, _ bool, args []string) {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	_, err := w.Write([]byte(ts.ReadFile(args[0])))
	ts.Check(errors.Join(err, w.Close()))
	ts.Check(os.WriteFile(ts.MkAbs(args[0]+".gz"), b.Bytes(), 0o600))
}

// pidIn returns the pid that JSON names.
func pidIn(ts *testscript.TestScript, file string) int {
	var process struct{ PID int }
	ts.Check(json.Unmarshal([]byte(ts.ReadFile(file)), &process))
	if process.PID == 0 {
		ts.Fatalf("%s names no process", file)
	}
	return process.PID
}

// slay: kills the process whose pid the JSON of the last output names.
func scriptSlay(ts *testscript.TestScript, _ bool, _ []string) {
	ts.Check(syscall.Kill(pidIn(ts, "stdout"), syscall.SIGKILL))
}

// gone FILE: waits until the process whose pid the JSON in the file names is gone.
func scriptGone(ts *testscript.TestScript, _ bool, args []string) {
	pid := pidIn(ts, args[0])
	await(ts, fmt.Sprintf("the end of process %d", pid), func() bool { return errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) })
}

// certs DIR...: makes in each directory an authority, and a certificate and key for 127.0.0.1 signed by it.
func scriptCerts(ts *testscript.TestScript, _ bool, dirs []string) {
	for _, dir := range dirs {
		dir = ts.MkAbs(dir)
		ts.Check(os.Mkdir(dir, 0o700))
		write := func(file, kind string, der []byte) {
			ts.Check(os.WriteFile(filepath.Join(dir, file), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
		}
		caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		ts.Check(err)
		ca := &x509.Certificate{
			SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"}, NotAfter: time.Now().Add(time.Hour),
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		}
		der, err := x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey)
		ts.Check(err)
		write("ca.pem", "CERTIFICATE", der)

		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		ts.Check(err)
		cert := &x509.Certificate{
			SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "node"}, NotAfter: time.Now().Add(time.Hour),
			IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		}
		der, err = x509.CreateCertificate(rand.Reader, cert, ca, key.Public(), caKey)
		ts.Check(err)
		write("cert.pem", "CERTIFICATE", der)
		der, err = x509.MarshalECPrivateKey(key)
		ts.Check(err)
		write("key.pem", "EC PRIVATE KEY", der)
	}
}
