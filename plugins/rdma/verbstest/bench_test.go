package verbstest_test

import (
	"fmt"
	"testing"

	"github.com/umbp/umbp/plugins/rdma/device"
	"github.com/umbp/umbp/plugins/rdma/verbstest"
)

// BenchmarkPost is what the simulation itself costs for a work request: the part of other benchmarks that no real host
// has.
func BenchmarkPost(b *testing.B) {
	for _, sges := range []int{1, 16} {
		b.Run(fmt.Sprintf("simulated/sges=%d", sges), func(b *testing.B) {
			const chain = 256
			f := verbstest.New(verbstest.Config{Instant: true, NoBytes: true})
			d, err := f.Open("simulated0")
			if err != nil {
				b.Fatal(err)
			}
			memory := make([]byte, 1<<20)
			mr, _ := d.Register(memory, everything)
			cq, _ := d.CreateCQ(chain)
			qp, err := d.CreateQP(device.QPConfig{CQ: cq, SendWRs: chain, SGEs: 16})
			if err != nil {
				b.Fatal(err)
			}
			gids, _ := d.GIDs(1)
			_ = qp.Init(1, everything)
			_ = qp.ReadyToReceive(device.ReceiveAttr{Port: 1, GIDIndex: 3, RemoteGID: gids[2].Addr, RemoteQPN: qp.Num(),
				RemotePSN: 7, MTU: 4096, Link: device.Ethernet})
			if err := qp.ReadyToSend(sender); err != nil {
				b.Fatal(err)
			}
			c := f.NewChain(chain, chain*sges)
			for i := range chain {
				c.WRs = append(c.WRs, device.WR{Remote: verbstest.Address(memory), RKey: mr.RKey(),
					FirstSGE: uint32(len(c.SGEs)), SGEs: uint16(sges), Signaled: i == chain-1})
				for range sges {
					c.SGEs = append(c.SGEs, device.SGE{Addr: verbstest.Address(memory), Length: 4096, LKey: mr.LKey()})
				}
			}
			b.ReportAllocs()
			for b.Loop() {
				if _, err := qp.Post(c); err != nil {
					b.Fatal(err)
				}
				if got, err := cq.Poll(); err != nil || len(got) != 1 || got[0].Status != device.Success {
					b.Fatal(got, err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*chain), "ns/WR")
			_, _, _, _ = qp.Close(), cq.Close(), mr.Close(), d.Close()
		})
	}
}
