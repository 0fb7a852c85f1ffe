package gpu

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"
)

// normalPCI writes a PCI address the way Linux does, domain:bus:device.function as in 0000:c1:00.0: the runtimes write
// letters of either case, domains of four digits or eight, and may leave the domain and the function out.
func normalPCI(s string) (string, error) {
	wrong := fmt.Errorf("%q is no PCI address", s)
	head, function, dotted := strings.Cut(s, ".")
	if !dotted {
		function = "0"
	}
	parts := strings.Split(head, ":")
	if len(parts) == 2 {
		parts = append([]string{"0"}, parts...)
	}
	if len(parts) != 3 {
		return "", wrong
	}
	var n [4]uint64
	for i, part := range append(parts, function) {
		// The bits of a domain, a bus, a device and a function.
		v, err := strconv.ParseUint(part, 16, [...]int{32, 8, 5, 3}[i])
		if err != nil {
			return "", wrong
		}
		n[i] = v
	}
	return fmt.Sprintf("%04x:%02x:%02x.%x", n[0], n[1], n[2], n[3]), nil
}

// IsCalled tells whether a name that a person gave is the device's: its number, or its PCI address in any usual form.
func (d Device) IsCalled(name string) bool {
	if name == strconv.Itoa(d.Number) {
		return true
	}
	pci, err := normalPCI(name)
	return err == nil && pci == d.PCI
}

// untilZero returns C's string in a buffer.
func untilZero(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b)
}
