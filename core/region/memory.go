package region

import (
	"bufio"
	"bytes"
	"fmt"
	"io/fs"
	"math"
	"path"
	"strconv"
	"strings"
)

// cgroupFiles are where the two versions of control groups keep what is asked here. The group's limit is a file
// of its own; what it uses includes the page cache, of which the inactive part is given up before anything is
// killed.
var cgroupFiles = []struct{ controller, mount, limit, usage, inactive string }{
	{"", "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"},
	{"memory", "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"},
}

// availableMemory returns how many bytes this process can populate before the kernel kills something, and who
// sets that bound, in words that the number follows. root is the root of the file system. Bounds that cannot be
// read are taken for none.
func availableMemory(root fs.FS) (free uint64, whose string) {
	free, whose = math.MaxUint64, "nothing bounds"
	meminfo, _ := fs.ReadFile(root, "proc/meminfo")
	if kib, ok := field(meminfo, "MemAvailable:"); ok {
		free, whose = kib<<10, "the host has"
	}
	groups, _ := fs.ReadFile(root, "proc/self/cgroup")
	for line := range strings.Lines(string(groups)) { // hierarchy:controllers:path
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		for _, files := range cgroupFiles {
			if len(parts) != 3 || parts[1] != files.controller {
				continue
			}
			// A limit of any group above counts as well. In a container the groups may be named as on the host
			// and mounted from the container's own: what is not there is passed over.
			for group := path.Clean("/" + parts[2]); ; group = path.Dir(group) {
				dir := path.Join(files.mount, group)
				limit, limited := number(root, path.Join(dir, files.limit))
				usage, known := number(root, path.Join(dir, files.usage))
				stat, _ := fs.ReadFile(root, path.Join(dir, "memory.stat"))
				inactive, _ := field(stat, files.inactive)
				usage -= min(usage, inactive)
				if left := limit - min(limit, usage); limited && known && left < free {
					free, whose = left, "the memory limit of control group "+group+" leaves"
				}
				if group == "/" {
					break
				}
			}
		}
	}
	return free, whose
}

// mappingBytes returns the sum of the fields of the mapping that starts at that address, as the kernel accounts
// for it in smaps; zero where it does not tell.
func mappingBytes(root fs.FS, start uintptr, fields ...string) (sum uint64) {
	file, err := root.Open("proc/self/smaps")
	if err != nil {
		return 0
	}
	defer file.Close()
	var mapping []byte // the lines of the one wanted
	header := fmt.Sprintf("%x-", start)
	inside := false
	for lines := bufio.NewScanner(file); lines.Scan(); {
		line := lines.Bytes()
		if bytes.HasPrefix(line, []byte(header)) {
			inside = true
		} else if inside && bytes.HasPrefix(line, []byte("VmFlags:")) {
			break
		}
		if inside {
			mapping = append(append(mapping, line...), '\n')
		}
	}
	for _, name := range fields {
		kib, _ := field(mapping, name+":")
		sum += kib << 10
	}
	return sum
}

// field returns the number that follows a name at the start of a line.
func field(text []byte, name string) (n uint64, ok bool) {
	for line := range bytes.Lines(text) {
		words := bytes.Fields(line)
		if len(words) >= 2 && string(words[0]) == name {
			n, err := strconv.ParseUint(string(words[1]), 10, 64)
			return n, err == nil
		}
	}
	return 0, false
}

// number reads a file that holds one number. "max", which stands for no limit, is none.
func number(root fs.FS, name string) (n uint64, ok bool) {
	text, err := fs.ReadFile(root, name)
	if err != nil {
		return 0, false
	}
	n, err = strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
	return n, err == nil
}
