package rdma

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/umbp/umbp/plugins/rdma/device"
)

func gid(index int, kind device.GIDType, addr string) device.GID {
	return device.GID{Index: index, Type: kind, Addr: netip.MustParseAddr(addr).As16()}
}

func TestChooseGID(t *testing.T) {
	var (
		v1Local  = gid(0, device.GIDRoCEv1, "fe80::1")
		v2Local  = gid(1, device.GIDRoCEv2, "fe80::1")
		v1Global = gid(2, device.GIDRoCEv1, "2001:db8::1")
		v2Global = gid(3, device.GIDRoCEv2, "2001:db8::1")
		v1Four   = gid(4, device.GIDRoCEv1, "::ffff:192.0.2.1")
		v2Four   = gid(5, device.GIDRoCEv2, "::ffff:192.0.2.1")
		v2Other  = gid(6, device.GIDRoCEv2, "::ffff:198.51.100.1")
		v2Auto   = gid(7, device.GIDRoCEv2, "::ffff:169.254.7.7") // an address of its own choice: good on the link only
		empty    = device.GID{Index: 8, Type: device.GIDRoCEv2}
		subnet   = gid(0, device.GIDInfiniBand, "fe80::2:c903:1:2")
		alias    = gid(1, device.GIDInfiniBand, "fe80::2:c903:1:3")
	)
	for _, c := range []struct {
		name  string
		link  device.Link
		index int
		gids  []device.GID
		want  int    // index
		err   string // instead
	}{
		{"IPv4 before all", device.Ethernet, -1, []device.GID{v1Local, v2Local, v1Global, v2Global, v1Four, v2Four}, 5, ""},
		{"the first of two", device.Ethernet, -1, []device.GID{v2Other, v2Four}, 5, ""},
		{"global IPv6 before link-local", device.Ethernet, -1, []device.GID{v1Local, v2Local, v1Global, v2Global, v2Auto}, 3, ""},
		{"link-local RoCEv2 before routable RoCEv1", device.Ethernet, -1, []device.GID{v1Local, v1Four, v2Local}, 1, ""},
		{"IPv4 of its own choice is link-local", device.Ethernet, -1, []device.GID{v2Auto, v2Global}, 3, ""},
		{"RoCEv1 where there is nothing else", device.Ethernet, -1, []device.GID{v1Global, v1Local}, 0, ""},
		{"an empty one is none", device.Ethernet, -1, []device.GID{empty, v1Local}, 0, ""},
		{"none", device.Ethernet, -1, []device.GID{empty}, 0, "no GID"},
		{"as set", device.Ethernet, 1, []device.GID{v1Local, v2Local, v2Four}, 1, ""},
		{"not there", device.Ethernet, 2, []device.GID{v1Local, v2Four}, 0, "no GID of index 2; it has 0: RoCEv1 fe80::1, 5: RoCEv2 192.0.2.1"},
		{"InfiniBand", device.InfiniBand, -1, []device.GID{alias, subnet}, 0, ""},
		{"InfiniBand, as set", device.InfiniBand, 1, []device.GID{subnet, alias}, 1, ""},
		{"InfiniBand, not there", device.InfiniBand, -1, nil, 0, "no GID of index 0; it has none"},
		{"neither", device.LinkUnknown, -1, []device.GID{v2Four}, 0, "neither"},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := slices.Clone(c.gids)
			got, err := chooseGID(c.link, c.gids, c.index)
			switch {
			case c.err == "" && err != nil:
				t.Fatal(err)
			case c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)):
				t.Fatalf("got GID %d and error %v, want one with %q", got.Index, err, c.err)
			case c.err == "" && (got.Index != c.want || !slices.Contains(c.gids, got)):
				t.Errorf("got GID %d, want %d", got.Index, c.want)
			}
			if !slices.Equal(before, c.gids) {
				t.Error("the table was changed")
			}
		})
	}
}
