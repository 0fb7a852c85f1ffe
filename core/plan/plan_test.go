package plan

import (
	"errors"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/umbp/umbp/plugin-sdk/backend"
	"pgregory.net/rapid"
)

func TestPlanEqualsNaiveCopy(t *testing.T) {
	var p Planner
	rapid.Check(t, func(t *rapid.T) {
		op := drawOp().Draw(t, "op")
		checkPlan(t, &p, op, drawRuns(op).Draw(t, "runs"), drawLimits().Draw(t, "limits"))
	})
}

// A Write has no two runs at the same remote offset, so its plan may not depend on the order of the runs at all.
func TestPlanDoesNotDependOnOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		runs := drawRuns(backend.Write).Draw(t, "runs")
		limits := drawLimits().Draw(t, "limits")
		var a, b Planner
		one, err := a.Plan(backend.Write, runs, limits)
		other, err2 := b.Plan(backend.Write, rapid.Permutation(runs).Draw(t, "permutation"), limits)
		if (err == nil) != (err2 == nil) {
			t.Fatalf("errors %v and %v for the same runs", err, err2)
		}
		if diff := cmp.Diff(one, other, cmp.AllowUnexported(Plan{}), cmpopts.EquateEmpty()); diff != "" {
			t.Fatalf("plans of the same runs differ:\n%s", diff)
		}
	})
}

// FuzzPlan reads a batch from bytes: the first four say the operation, the base of the offsets and the limits, and
// each five that follow are a run.
func FuzzPlan(f *testing.F) {
	f.Add([]byte{0, 0, 0, 0, 1, 0, 0, 0, 8, 1, 0, 8, 8, 8})                      // two values that touch
	f.Add([]byte{1, 0, 0, 0, 1, 0, 0, 0, 8, 2, 0, 8, 0, 8})                      // one value read twice
	f.Add([]byte{0, 0, 0, 0, 1, 0, 0, 0, 8, 2, 0, 8, 7, 8})                      // an overlap of one byte
	f.Add([]byte{1, 0, 0, 0, 1, 0x10, 0, 0, 8, 2, 0x20, 4, 9, 8})                // an overlap across remote regions
	f.Add([]byte{2, 7, 0, 0, 1, 0, 0, 0, 100})                                   // cut at seven bytes, near 2⁶⁴
	f.Add([]byte{0, 7, 2, 10, 1, 0, 0, 0, 100, 2, 0, 100, 100, 9})               // every limit at once
	f.Add([]byte{4, 0, 0, 0, 1, 0x55, 9, 9, 9, 1, 0x12, 3, 3, 3, 0, 0, 0, 0, 1}) // wide region numbers
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) < 4 || len(data) > 4+5*200 { // the oracle takes its time over every byte
			return
		}
		op := []backend.Op{backend.Write, backend.Read}[data[0]&1]
		base := offsetBases[int(data[0]>>1)%len(offsetBases)]
		limits := backend.Limits{
			SegmentBytes: uint64(data[1]), Segments: int(data[2]), TransferBytes: uint64(data[3]),
		}
		var runs []Run
		for data = data[4:]; len(data) >= 5; data = data[5:] {
			runs = append(runs, Run{
				Key:          uint32(data[0]),
				Local:        regionNumbers[int(data[1]>>4)%len(regionNumbers)],
				Remote:       regionNumbers[int(data[1]&15)%len(regionNumbers)],
				LocalOffset:  base + uint64(data[2]),
				RemoteOffset: base + uint64(data[3]),
				Length:       uint64(data[4])%128 + 1,
			})
		}
		checkPlan(t, new(Planner), op, runs, limits)
	})
}

const page = 4096

func TestPlan(t *testing.T) {
	for _, tc := range []struct {
		name     string
		op       backend.Op
		limits   backend.Limits
		runs     []Run
		groups   []Group
		segments []backend.Segment
		keys     [][]uint32
	}{
		{
			name: "nothing", op: backend.Write,
		},
		{
			name: "values that touch become one segment, in any order", op: backend.Write,
			runs: []Run{
				{Key: 2, LocalOffset: 2 * page, RemoteOffset: 7 * page, Length: page},
				{Key: 0, LocalOffset: 0, RemoteOffset: 5 * page, Length: page},
				{Key: 1, LocalOffset: page, RemoteOffset: 6 * page, Length: page},
			},
			groups:   []Group{{Count: 1, Bytes: 3 * page}},
			segments: []backend.Segment{{Local: 0, Remote: 5 * page, Length: 3 * page}},
			keys:     [][]uint32{{0, 1, 2}},
		},
		{
			name: "touching on one side only is not enough", op: backend.Read,
			runs: []Run{
				{LocalOffset: 0, RemoteOffset: 0, Length: page},
				{LocalOffset: 2 * page, RemoteOffset: page, Length: page},
				{LocalOffset: 3 * page, RemoteOffset: 3 * page, Length: page},
			},
			groups: []Group{{Count: 3, Bytes: 3 * page}},
			segments: []backend.Segment{
				{Local: 0, Remote: 0, Length: page},
				{Local: 2 * page, Remote: page, Length: page},
				{Local: 3 * page, Remote: 3 * page, Length: page},
			},
			keys: [][]uint32{{0}, {0}, {0}},
		},
		{
			name: "touching in another region is nothing", op: backend.Write,
			runs: []Run{
				{Key: 0, Local: 1, LocalOffset: 0, RemoteOffset: 0, Length: page},
				{Key: 1, Local: 0, LocalOffset: page, RemoteOffset: page, Length: page},
			},
			groups: []Group{{Count: 1, Bytes: page}, {Local: 1, First: 1, Count: 1, Bytes: page}},
			segments: []backend.Segment{
				{Local: page, Remote: page, Length: page},
				{Local: 0, Remote: 0, Length: page},
			},
			keys: [][]uint32{{1}, {0}},
		},
		{
			name: "interleaved values stand in Keys once a stretch", op: backend.Write,
			runs: []Run{
				{Key: 0, Length: page},
				{Key: 1, LocalOffset: page, RemoteOffset: page, Length: page},
				{Key: 0, LocalOffset: 2 * page, RemoteOffset: 2 * page, Length: page},
			},
			groups:   []Group{{Count: 1, Bytes: 3 * page}},
			segments: []backend.Segment{{Length: 3 * page}},
			keys:     [][]uint32{{0, 1, 0}},
		},
		{
			name: "a Read may read twice what it writes once", op: backend.Read,
			runs: []Run{
				{Key: 0, LocalOffset: page, Length: page},
				{Key: 1, LocalOffset: 0, Length: page},
			},
			groups: []Group{{Count: 2, Bytes: 2 * page}},
			segments: []backend.Segment{
				{Local: page, Remote: 0, Length: page},
				{Local: 0, Remote: 0, Length: page},
			},
			keys: [][]uint32{{0}, {1}},
		},
		{
			name: "a group is sorted even where a Read cuts what it reads twice", op: backend.Read,
			limits: backend.Limits{SegmentBytes: page},
			runs: []Run{
				{Key: 0, LocalOffset: 0, Length: 2 * page},
				{Key: 1, LocalOffset: 2 * page, Length: 2 * page},
			},
			groups: []Group{{Count: 2, Bytes: 2 * page}, {First: 2, Count: 2, Bytes: 2 * page}},
			segments: []backend.Segment{
				{Local: 0, Remote: 0, Length: page},
				{Local: page, Remote: page, Length: page},
				{Local: 2 * page, Remote: 0, Length: page},
				{Local: 3 * page, Remote: page, Length: page},
			},
			keys: [][]uint32{{0}, {0}, {1}, {1}},
		},
		{
			name: "a transfer is filled, by a cut if need be", op: backend.Write,
			limits: backend.Limits{SegmentBytes: 2 * page, TransferBytes: 5 * page},
			runs: []Run{
				{Key: 0, Length: 4 * page},
				{Key: 1, LocalOffset: 4 * page, RemoteOffset: 4 * page, Length: 4 * page},
			},
			groups: []Group{{Count: 3, Bytes: 5 * page}, {First: 3, Count: 2, Bytes: 3 * page}},
			segments: []backend.Segment{
				{Local: 0, Remote: 0, Length: 2 * page},
				{Local: 2 * page, Remote: 2 * page, Length: 2 * page},
				{Local: 4 * page, Remote: 4 * page, Length: page},
				{Local: 5 * page, Remote: 5 * page, Length: 2 * page},
				{Local: 7 * page, Remote: 7 * page, Length: page},
			},
			keys: [][]uint32{{0}, {0}, {1}, {1}, {1}},
		},
		{
			name: "a transfer limit shorter than a segment's", op: backend.Write,
			limits: backend.Limits{SegmentBytes: 8 * page, TransferBytes: 2 * page},
			runs:   []Run{{Length: 3 * page}},
			groups: []Group{{Count: 1, Bytes: 2 * page}, {First: 1, Count: 1, Bytes: page}},
			segments: []backend.Segment{
				{Local: 0, Remote: 0, Length: 2 * page},
				{Local: 2 * page, Remote: 2 * page, Length: page},
			},
			keys: [][]uint32{{0}, {0}},
		},
		{
			name: "the limit of segments begins a new group", op: backend.Write,
			limits: backend.Limits{Segments: 1},
			runs: []Run{
				{Key: 0, Length: page},
				{Key: 1, LocalOffset: 9 * page, RemoteOffset: page, Length: page},
			},
			groups: []Group{{Count: 1, Bytes: page}, {First: 1, Count: 1, Bytes: page}},
			segments: []backend.Segment{
				{Length: page},
				{Local: 9 * page, Remote: page, Length: page},
			},
			keys: [][]uint32{{0}, {1}},
		},
		{
			name: "no segment is longer than 32 bits, whatever the limit", op: backend.Write,
			limits: backend.Limits{SegmentBytes: 1 << 40},
			runs: []Run{
				{Key: 0, Length: 1 << 32},
				{Key: 1, LocalOffset: 1 << 32, RemoteOffset: 1 << 32, Length: page},
			},
			groups: []Group{{Count: 2, Bytes: 1<<32 + page}},
			segments: []backend.Segment{
				{Length: maxSegment},
				{Local: maxSegment, Remote: maxSegment, Length: 1<<32 - maxSegment + page},
			},
			keys: [][]uint32{{0}, {0, 1}},
		},
		{
			name: "the last bytes that 64 bits can name", op: backend.Write,
			runs: []Run{
				{Key: 1, LocalOffset: 3, RemoteOffset: math.MaxUint64 - 2, Length: 2},
				{Key: 0, LocalOffset: 0, RemoteOffset: math.MaxUint64 - 5, Length: 3},
			},
			groups:   []Group{{Count: 1, Bytes: 5}},
			segments: []backend.Segment{{Local: 0, Remote: math.MaxUint64 - 5, Length: 5}},
			keys:     [][]uint32{{0, 1}},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var p Planner
			pl, err := p.Plan(tc.op, tc.runs, tc.limits)
			if err != nil {
				t.Fatal(err)
			}
			var keys [][]uint32
			for i := range pl.Segments {
				keys = append(keys, pl.Keys(i))
			}
			for _, diff := range []string{
				cmp.Diff(tc.groups, pl.Groups), cmp.Diff(tc.segments, pl.Segments), cmp.Diff(tc.keys, keys),
			} {
				if diff != "" {
					t.Errorf("the plan differs (-want +got):\n%s", diff)
				}
			}
		})
	}
}

func TestPlanRefuses(t *testing.T) {
	for _, tc := range []struct {
		name string
		op   backend.Op
		runs []Run
		want error
		text string
	}{
		{
			name: "an empty run", op: backend.Write,
			runs: []Run{{Key: 3, Length: 1}, {Key: 4, RemoteOffset: 1, LocalOffset: 1}},
			want: &RunError{Index: 1, Run: Run{Key: 4, RemoteOffset: 1, LocalOffset: 1}},
			text: "run 1 of key 4 (local region 0 offset 1, remote region 0 offset 1, length 0): " +
				"it is empty: leave such runs out",
		},
		{
			name: "an empty run that continues its value", op: backend.Write,
			runs: []Run{{Length: 1}, {RemoteOffset: 1, LocalOffset: 1}},
			want: &RunError{Index: 1, Run: Run{RemoteOffset: 1, LocalOffset: 1}},
		},
		{
			name: "a remote range beyond 64 bits", op: backend.Write,
			runs: []Run{{Key: 9, Local: 1, Remote: 2, RemoteOffset: math.MaxUint64, Length: 1}},
			want: &RunError{Run: Run{Key: 9, Local: 1, Remote: 2, RemoteOffset: math.MaxUint64, Length: 1}},
			text: "run 0 of key 9 (local region 1 offset 0, remote region 2 offset 18446744073709551615, length 1): " +
				"the remote range ends beyond 64 bits",
		},
		{
			name: "a local range beyond 64 bits", op: backend.Write,
			runs: []Run{{LocalOffset: 2, Length: math.MaxUint64 - 1}},
			want: &RunError{Run: Run{LocalOffset: 2, Length: math.MaxUint64 - 1}},
			text: "run 0 of key 0 (local region 0 offset 2, remote region 0 offset 0, length 18446744073709551614): " +
				"the local range ends beyond 64 bits",
		},
		{
			name: "a range beyond 64 bits that continues its value", op: backend.Write,
			runs: []Run{
				{RemoteOffset: math.MaxUint64 - 2, Length: 1},
				{LocalOffset: 1, RemoteOffset: math.MaxUint64 - 1, Length: 2},
			},
			want: &RunError{Index: 1, Run: Run{LocalOffset: 1, RemoteOffset: math.MaxUint64 - 1, Length: 2}},
		},
		{
			name: "a Write of the same remote bytes from two local regions", op: backend.Write,
			runs: []Run{
				{Key: 5, Local: 1, Remote: 7, RemoteOffset: page, Length: page},
				{Key: 6, Local: 0, Remote: 7, RemoteOffset: 2*page - 1, Length: page},
			},
			want: &OverlapError{
				Op: backend.Write, First: Culprit{0, 5}, Second: Culprit{1, 6}, Region: 7, Offset: 2*page - 1, Length: 1,
			},
			text: "run 0 of key 5 and run 1 of key 6 both write to remote region 7, range [8191, +1)",
		},
		{
			name: "a Read into the same local bytes from two remote regions", op: backend.Read,
			runs: []Run{
				{Key: 5, Local: 3, Remote: 1, LocalOffset: page, Length: 9},
				{Key: 6, Local: 3, Remote: 0, LocalOffset: 0, Length: 3 * page},
			},
			want: &OverlapError{
				Op: backend.Read, First: Culprit{0, 5}, Second: Culprit{1, 6}, Region: 3, Offset: page, Length: 9,
			},
			text: "run 0 of key 5 and run 1 of key 6 both read into local region 3, range [4096, +9)",
		},
		{
			name: "a key that is there twice", op: backend.Write,
			runs: []Run{{Key: 5, Length: page}, {Key: 5, LocalOffset: page, Length: page}},
			want: &OverlapError{Op: backend.Write, First: Culprit{0, 5}, Second: Culprit{1, 5}, Length: page},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var p Planner
			_, err := p.Plan(tc.op, tc.runs, backend.Limits{})
			if diff := cmp.Diff(tc.want, err); diff != "" {
				t.Errorf("the error differs (-want +got):\n%s", diff)
			}
			if !errors.Is(err, backend.ErrBadRequest) || backend.CodeOf(err) != backend.BadRequest {
				t.Errorf("%v is not a bad request", err)
			}
			if tc.text != "" && err.Error() != tc.text {
				t.Errorf("text %q\nwant %q", err, tc.text)
			}
			if pl, err := p.Plan(tc.op, tc.runs[:1], backend.Limits{}); err == nil {
				checkShape(t, pl, backend.Limits{}) // a refusal leaves nothing behind
			}
		})
	}
}

func TestPlannersRefuseOperationsThatAreNeither(t *testing.T) {
	var p Planner
	for _, op := range []backend.Op{0, backend.Read | backend.Write, 8} {
		if _, err := p.Plan(op, nil, backend.Limits{}); !errors.Is(err, backend.ErrBadRequest) {
			t.Errorf("Plan of %v: %v, want a bad request", op, err)
		}
		if _, err := p.PerPage(op, nil, page); !errors.Is(err, backend.ErrBadRequest) {
			t.Errorf("PerPage of %v: %v, want a bad request", op, err)
		}
	}
}

func TestPerPage(t *testing.T) {
	var p Planner
	runs := []Run{
		{Key: 2, Local: 1, Remote: 3, LocalOffset: 8 * page, RemoteOffset: page, Length: 2*page + 1},
		{Key: 1, Local: 1, Remote: 2, LocalOffset: 0, RemoteOffset: 0, Length: page},
	}
	pl, err := p.PerPage(backend.Read, runs, page)
	if err != nil {
		t.Fatal(err)
	}
	want := &Plan{
		Op: backend.Read, Runs: 2,
		Groups: []Group{
			{Local: 1, Remote: 3, First: 0, Count: 1, Bytes: page},
			{Local: 1, Remote: 3, First: 1, Count: 1, Bytes: page},
			{Local: 1, Remote: 3, First: 2, Count: 1, Bytes: 1},
			{Local: 1, Remote: 2, First: 3, Count: 1, Bytes: page},
		},
		Segments: []backend.Segment{
			{Local: 8 * page, Remote: page, Length: page},
			{Local: 9 * page, Remote: 2 * page, Length: page},
			{Local: 10 * page, Remote: 3 * page, Length: 1},
			{Local: 0, Remote: 0, Length: page},
		},
		keys:     []uint32{2, 2, 2, 1},
		firstKey: []uint32{0, 1, 2, 3},
	}
	if diff := cmp.Diff(want, pl, cmp.AllowUnexported(Plan{})); diff != "" {
		t.Errorf("the plan differs (-want +got):\n%s", diff)
	}
	for i, key := range []uint32{2, 2, 2, 1} {
		if keys := pl.Keys(i); !slices.Equal(keys, []uint32{key}) {
			t.Errorf("Keys(%d) = %v, want only %d", i, keys, key)
		}
	}
}

func TestPerPageRefuses(t *testing.T) {
	var p Planner
	for _, pageBytes := range []uint64{0, maxSegment + 1} {
		if _, err := p.PerPage(backend.Write, []Run{{Length: 1}}, pageBytes); !errors.Is(err, backend.ErrBadRequest) {
			t.Errorf("pages of %d bytes: %v, want a bad request", pageBytes, err)
		}
	}
	for _, bad := range []Run{{Key: 1}, {Key: 1, LocalOffset: math.MaxUint64, Length: 1}} {
		_, err := p.PerPage(backend.Write, []Run{{Length: 1}, bad}, page)
		if diff := cmp.Diff(&RunError{Index: 1, Run: bad}, err); diff != "" {
			t.Errorf("the error for %+v differs (-want +got):\n%s", bad, diff)
		}
	}
}

// A planner that has seen a batch of a size plans the next one without allocating, however it is ordered.
func TestWarmPlannerDoesNotAllocate(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	for _, n := range []uint64{1, 10, 300} { // 10 are sorted by comparing, 300 by digits
		inOrder := make([]Run, n)
		for i := range inOrder {
			inOrder[i] = Run{
				Key: uint32(i), Remote: uint32(i % 3), Length: page,
				LocalOffset: uint64(i) * page, RemoteOffset: uint64(2*i) * page,
			}
		}
		shuffled := slices.Clone(inOrder)
		random.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
		wide := slices.Clone(shuffled) // too wide to be sorted by digits
		for i := range wide {
			wide[i].Remote += math.MaxUint32 - 3
			wide[i].RemoteOffset += math.MaxUint64 - 1<<40
		}
		for name, runs := range map[string][]Run{"in order": inOrder, "shuffled": shuffled, "wide": wide} {
			for _, op := range []backend.Op{backend.Write, backend.Read} {
				var p Planner
				got := testing.AllocsPerRun(10, func() {
					pl, err := p.Plan(op, runs, backend.Limits{SegmentBytes: page / 2, Segments: 7})
					if err != nil {
						t.Fatal(err)
					}
					for i := range pl.Segments {
						if len(pl.Keys(i)) != 1 {
							t.Fatalf("segment %d has keys %v, want one", i, pl.Keys(i))
						}
					}
					if _, err := p.PerPage(op, runs, page/2); err != nil {
						t.Fatal(err)
					}
				})
				if got != 0 {
					t.Errorf("%s of %d runs, %s: %v allocations, want none", op, n, name, got)
				}
			}
		}
	}
}

func TestSorterEqualsStableSort(t *testing.T) {
	var s sorter
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.SampledFrom([]int{0, 1, fewPlaces - 1, fewPlaces, 300}).Draw(t, "places")
		regions := rapid.Uint64Max(rapid.SampledFrom([]uint64{0, 3, math.MaxUint32}).Draw(t, "regions"))
		shift := rapid.SampledFrom([]int{0, 12}).Draw(t, "shift")
		offsets := rapid.Uint64Max(rapid.SampledFrom([]uint64{0, 9, 1 << 20, math.MaxUint64 >> 12}).Draw(t, "offsets"))
		places := make([]place, n)
		for i := range places {
			places[i] = place{regions.Draw(t, "region"), offsets.Draw(t, "offset") << shift}
		}
		want := make([]uint32, n)
		for i := range want {
			want[i] = uint32(i)
		}
		slices.SortStableFunc(want, func(a, b uint32) int {
			if places[a].region != places[b].region {
				return cmpUint(places[a].region, places[b].region)
			}
			return cmpUint(places[a].offset, places[b].offset)
		})
		if got := s.sort(places); !slices.Equal(got, want) {
			t.Fatalf("sort(%v) = %v, want %v", places, got, want)
		}
	})
}

func cmpUint(a, b uint64) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}
