package region

import (
	"math"
	"os"
	"strings"
	"testing"
	"testing/fstest"
)

// files makes a file system of names and contents.
func files(pairs ...string) fstest.MapFS {
	root := fstest.MapFS{}
	for i := 0; i < len(pairs); i += 2 {
		root[pairs[i]] = &fstest.MapFile{Data: []byte(pairs[i+1])}
	}
	return root
}

func TestAvailableMemory(t *testing.T) {
	const meminfo = "MemTotal:  2000 kB\nMemFree:  1 kB\nMemAvailable:    1000 kB\n"
	for _, test := range []struct {
		name  string
		root  fstest.MapFS
		free  uint64
		whose string
	}{
		{"nothing known", files(), math.MaxUint64, "nothing"},
		{"no groups", files("proc/meminfo", meminfo), 1000 << 10, "the host"},
		{"version 2, with page cache", files(
			"proc/meminfo", meminfo,
			"proc/self/cgroup", "0::/pod/app\n",
			"sys/fs/cgroup/pod/app/memory.max", "500000\n",
			"sys/fs/cgroup/pod/app/memory.current", "400000\n",
			"sys/fs/cgroup/pod/app/memory.stat", "anon 100000\ninactive_file 250000\n",
		), 350000, "/pod/app"},
		{"version 2, limit of a group above", files(
			"proc/meminfo", meminfo,
			"proc/self/cgroup", "0::/pod/app\n",
			"sys/fs/cgroup/pod/app/memory.max", "max\n",
			"sys/fs/cgroup/pod/app/memory.current", "1\n",
			"sys/fs/cgroup/pod/memory.max", "70\n",
			"sys/fs/cgroup/pod/memory.current", "30\n",
		), 40, "/pod leaves"},
		{"version 2, over the limit", files(
			"proc/meminfo", meminfo,
			"proc/self/cgroup", "0::/\n",
			"sys/fs/cgroup/memory.max", "70\n",
			"sys/fs/cgroup/memory.current", "90\n",
		), 0, "group / leaves"},
		{"version 1, mounted from the container's group", files(
			"proc/meminfo", meminfo,
			"proc/self/cgroup", "8:pids:/docker/abc\n4:memory:/docker/abc\n",
			"sys/fs/cgroup/memory/memory.limit_in_bytes", "5000\n",
			"sys/fs/cgroup/memory/memory.usage_in_bytes", "2000\n",
			"sys/fs/cgroup/memory/memory.stat", "inactive_file 7\ntotal_inactive_file 500\n",
		), 3500, "group / leaves"},
		{"a limit beyond what the host has", files(
			"proc/meminfo", meminfo,
			"proc/self/cgroup", "4:memory:/a\n",
			"sys/fs/cgroup/memory/a/memory.limit_in_bytes", "9223372036854771712\n",
			"sys/fs/cgroup/memory/a/memory.usage_in_bytes", "2000\n",
		), 1000 << 10, "the host"},
		{"broken files", files(
			"proc/meminfo", "MemAvailable: many kB\n",
			"proc/self/cgroup", "nonsense\n0:\n",
		), math.MaxUint64, "nothing"},
	} {
		t.Run(test.name, func(t *testing.T) {
			free, whose := availableMemory(test.root)
			if free != test.free || !strings.Contains(whose, test.whose) {
				t.Errorf("%q %d, want %q %d", whose, free, test.whose, test.free)
			}
		})
	}
	if free, whose := availableMemory(os.DirFS("/")); free == 0 || free == math.MaxUint64 {
		t.Errorf("here %s %d", whose, free)
	}
}

func TestMappingBytes(t *testing.T) {
	root := files("proc/self/smaps", `7f0000000000-7f0000200000 rw-s 00000000 00:01 9 /memfd:other
Rss:                2048 kB
ShmemPmdMapped:     2048 kB
VmFlags: rd wr sh
7f1000000000-7f1000600000 rw-s 00000000 00:01 10 /memfd:this
Rss:                6144 kB
ShmemPmdMapped:     4096 kB
FilePmdMapped:         8 kB
VmFlags: rd wr sh
7f2000000000-7f2000600000 rw-s 00000000 00:01 11 /memfd:last
Rss:                   4 kB
FilePmdMapped:         4 kB
`)
	for _, test := range []struct {
		start  uintptr
		fields []string
		want   uint64
	}{
		{0x7f1000000000, []string{"ShmemPmdMapped", "FilePmdMapped"}, 4104 << 10},
		{0x7f1000000000, []string{"Rss"}, 6144 << 10},
		{0x7f2000000000, []string{"Rss", "Missing"}, 4 << 10},
		{0x7f1000001000, []string{"Rss"}, 0},
	} {
		if got := mappingBytes(root, test.start, test.fields...); got != test.want {
			t.Errorf("%x %v: %d, want %d", test.start, test.fields, got, test.want)
		}
	}
	if got := mappingBytes(files(), 1, "Rss"); got != 0 {
		t.Errorf("without smaps: %d", got)
	}
}
