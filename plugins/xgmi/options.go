package xgmi

import (
	"slices"
	"strconv"
	"strings"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/gpu"
	"github.com/umbp/umbp/plugin-sdk/samehost"
)

var options = append([]backend.Option{
	{
		Name: "runtime", Type: backend.StringOption, Default: "auto", Choices: []string{"auto", "hip", "cuda"},
		Help: "Runtime of the GPUs; auto takes HIP where it has a device, and else CUDA.",
	},
	{
		Name: "library", Type: backend.StringOption,
		Help: "Path of the runtime's library; empty looks for it under the known names and in the known places.",
	},
	{
		Name: "devices", Type: backend.StringOption,
		Help: "GPUs to use, as PCI addresses or as the runtime's numbers, separated by commas; empty uses all.",
	},
	{
		Name: "streams", Type: backend.IntOption, Default: "4", Min: "1", Max: "32",
		Help: "Transfers that one GPU copies side by side.",
	},
	{
		Name: "part_bytes", Type: backend.SizeOption, Default: "32MiB", Min: "64KiB", Max: "1GiB",
		Help: "About how many bytes of a transfer go to the GPU at once; a few such parts are on their way when a transfer is cancelled.",
	},
	{
		Name: "batch", Type: backend.StringOption, Default: "auto", Choices: []string{"auto", "off"},
		Help: "Whether many small copies go as one batch where the runtime has that.",
	},
	{
		Name: "self_test", Type: backend.BoolOption, Default: "true",
		Help: "Whether patterns are moved and compared between two places before a connection uses them for the first time.",
	},
}, samehost.Options()...)

// settings are the values of the options that are this package's own.
type settings struct {
	gpu       gpu.Options
	devices   []string // PCI addresses, or numbers; empty for all
	streams   int
	partBytes uint64
	batch     bool
	selfTest  bool
}

func readSettings(v backend.Values) settings {
	s := settings{
		gpu:       gpu.Options{Runtime: v.String("runtime"), Library: v.String("library")},
		streams:   v.Int("streams"),
		partBytes: v.Size("part_bytes"),
		batch:     v.String("batch") == "auto",
		selfTest:  v.Bool("self_test"),
	}
	if s.gpu.Runtime == "auto" {
		s.gpu.Runtime = ""
	}
	for name := range strings.SplitSeq(v.String("devices"), ",") {
		if name = strings.TrimSpace(name); name != "" {
			s.devices = append(s.devices, strings.ToLower(name))
		}
	}
	return s
}

// choose returns the devices that are to be used, in the runtime's order.
func (s *settings) choose(all []gpu.Device) ([]gpu.Device, error) {
	if len(s.devices) == 0 {
		return all, nil
	}
	for _, name := range s.devices {
		if !slices.ContainsFunc(all, func(d gpu.Device) bool { return d.IsCalled(name) }) {
			return nil, backend.Errorf(backend.BadRequest, "there is no GPU %s (option devices); there are %s", name, list(all))
		}
	}
	return slices.DeleteFunc(slices.Clone(all), func(d gpu.Device) bool {
		return !slices.ContainsFunc(s.devices, func(name string) bool { return d.IsCalled(name) })
	}), nil
}

// list names devices for people: 0000:c1:00.0 (number 0), ...
func list(devices []gpu.Device) string {
	words := make([]string, len(devices))
	for i, d := range devices {
		words[i] = d.PCI + " (number " + strconv.Itoa(d.Number) + ")"
	}
	return strings.Join(words, ", ")
}
