package peer

import (
	"fmt"
	"math"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	"github.com/umbp/umbp/core/internal/wire"
	"github.com/umbp/umbp/core/internal/wire/wirepb"
	"github.com/umbp/umbp/core/peer/peerpb"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// fill sets every field that v consists of to a value of its own, so that a conversion that drops or swaps any of
// them is caught.
func fill(v reflect.Value, next *uint64) {
	*next++
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			fill(v.Field(i), next)
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 3, 3))
		for i := range v.Len() {
			fill(v.Index(i), next)
		}
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		for range 2 {
			key, item := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
			fill(key, next)
			fill(item, next)
			v.SetMapIndex(key, item)
		}
	case reflect.String:
		v.SetString(fmt.Sprint("text-", *next))
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Float64:
		v.SetFloat(float64(*next) + 0.5)
	case reflect.Int64:
		v.SetInt(int64(*next))
	case reflect.Uint8:
		v.SetUint(*next%uint64(Refused) + 1) // a Status, or any byte
	case reflect.Uint32, reflect.Uint64:
		v.SetUint(*next)
	default:
		panic("no value for a " + v.Kind().String())
	}
}

// filled returns a T without a zero field. The runs of its rows are made to follow each other: the wire does not
// carry what can be added up.
func filled[T any]() *T {
	x, next := new(T), uint64(0)
	fill(reflect.ValueOf(x).Elem(), &next)
	switch r := any(x).(type) {
	case *AllocateReply:
		r.Runs = nil
		for i := range r.Slots {
			r.Slots[i].FirstRun, r.Slots[i].RunCount = uint32(len(r.Runs)), uint32(i+1)
			r.Runs = append(r.Runs, filledRuns(i+1)...)
		}
	case *ResolveReply:
		r.Runs = nil
		for i := range r.Values {
			r.Values[i].FirstRun, r.Values[i].RunCount = uint32(len(r.Runs)), uint32(i+1)
			r.Runs = append(r.Runs, filledRuns(i+1)...)
		}
	}
	return x
}

func filledRuns(n int) []Run {
	runs, next := make([]Run, n), uint64(100*n)
	for i := range runs {
		fill(reflect.ValueOf(&runs[i]).Elem(), &next)
	}
	return runs
}

// dropped converts a filled T to the wire and back, and says what has changed on the way.
func dropped[T any, M proto.Message](to func(*T) M, from func(M) (*T, error)) (string, error) {
	want := filled[T]()
	message := to(want)
	data, err := proto.Marshal(message)
	if err != nil {
		return "", err
	}
	arrived := message.ProtoReflect().New().Interface().(M)
	if err := proto.Unmarshal(data, arrived); err != nil {
		return "", err
	}
	got, err := from(arrived)
	return cmp.Diff(want, got), err
}

// sure is for conversions that cannot fail.
func sure[M, T any](from func(M) *T) func(M) (*T, error) {
	return func(m M) (*T, error) { return from(m), nil }
}

func commitReplyToProto(r *CommitReply) *peerpb.CommitReply {
	return &peerpb.CommitReply{Statuses: statusesToProto(r.Statuses)}
}

func commitReplyFromProto(p *peerpb.CommitReply) *CommitReply {
	return &CommitReply{Statuses: statusesFromProto(p.GetStatuses(), nil)}
}

func TestConversionsKeepEveryField(t *testing.T) {
	check := func(name string) func(diff string, err error) {
		return func(diff string, err error) {
			if diff != "" || err != nil {
				t.Errorf("%s: %v (-sent +arrived):\n%s", name, err, diff)
			}
		}
	}
	check("Description")(dropped(descriptionToProto, descriptionFromProto))
	check("AnswerRequest")(dropped(answerToProto, sure(answerFromProto)))
	check("AnswerReply")(dropped(answeredToProto, sure(answeredFromProto)))
	check("AllocateRequest")(dropped(allocateToProto, allocateFromProto))
	check("AllocateReply")(dropped(allocatedToProto, func(p *peerpb.AllocateReply) (*AllocateReply, error) {
		r := filled[AllocateReply]() // must be overwritten
		return r, allocatedFromProto(p, 3, r)
	}))
	check("CommitRequest")(dropped(commitToProto, commitFromProto))
	check("CommitReply")(dropped(commitReplyToProto, sure(commitReplyFromProto)))
	check("AbortRequest")(dropped(abortToProto, sure(abortFromProto)))
	check("ResolveRequest")(dropped(resolveToProto, resolveFromProto))
	check("ResolveReply")(dropped(resolvedToProto, func(p *peerpb.ResolveReply) (*ResolveReply, error) {
		r := filled[ResolveReply]()
		return r, resolvedFromProto(p, 3, r)
	}))
	check("ReleaseRequest")(dropped(releaseToProto, sure(releaseFromProto)))
	check("ReleaseReply")(dropped(releasedToProto, sure(releasedFromProto)))
	check("RemoveRequest")(dropped(removeToProto, removeFromProto))
	check("Stats")(dropped(statsToProto, sure(statsFromProto)))
}

// The check itself must notice a field that is dropped, at any depth.
func TestDroppedFieldsAreNoticed(t *testing.T) {
	drops := map[string]func(*AllocateReply){
		"a field":             func(r *AllocateReply) { r.TTL = 0 },
		"a slice":             func(r *AllocateReply) { r.Runs = nil },
		"a field of a row":    func(r *AllocateReply) { r.Slots[2].ID = 0 },
		"two fields swapped":  func(r *AllocateReply) { r.Runs[0].Offset, r.Runs[0].Length = r.Runs[0].Length, r.Runs[0].Offset },
		"two rows swapped":    func(r *AllocateReply) { r.Runs[1], r.Runs[2] = r.Runs[2], r.Runs[1] },
		"the status of a row": func(r *AllocateReply) { r.Slots[0].Status = Unknown },
	}
	for name, drop := range drops {
		diff, err := dropped(allocatedToProto, func(p *peerpb.AllocateReply) (*AllocateReply, error) {
			r := new(AllocateReply)
			err := allocatedFromProto(p, 3, r)
			drop(r)
			return r, err
		})
		if diff == "" || err != nil {
			t.Errorf("%s: not noticed, or %v", name, err)
		}
	}
	if d := filled[Description](); d.Regions[2].Keys == nil || d.Regions[2].Peer.Host == "" || d.Regions[0].ID == d.Regions[1].ID {
		t.Errorf("fill leaves something out: %+v", d)
	}
}

func TestStatusesAgreeWithTheWire(t *testing.T) {
	names := map[Status]string{
		Unknown: "UNKNOWN", OK: "OK", Exists: "EXISTS", Missing: "MISSING", NoSpace: "NO_SPACE", Expired: "EXPIRED",
		Refused: "REFUSED",
	}
	if len(names) != len(peerpb.Status_name) {
		t.Errorf("%d statuses, and %d on the wire", len(names), len(peerpb.Status_name))
	}
	for s, name := range names {
		if got := peerpb.Status(s).String(); got != "STATUS_"+name {
			t.Errorf("status %d is %s on the wire, want STATUS_%s", s, got, name)
		}
	}
	for _, s := range []peerpb.Status{-1, 7, 256 + 1, math.MaxInt32} {
		if got := statusFromProto(s); got != Unknown {
			t.Errorf("status %d from the wire is %d, want Unknown", s, got)
		}
	}
}

func TestMalformedMessagesAreRefused(t *testing.T) {
	allocated := func(change func(*peerpb.AllocateReply)) error {
		p := allocatedToProto(filled[AllocateReply]())
		change(p)
		return allocatedFromProto(p, 3, new(AllocateReply))
	}
	resolved := func(change func(*peerpb.ResolveReply)) error {
		p := resolvedToProto(filled[ResolveReply]())
		change(p)
		return resolvedFromProto(p, 3, new(ResolveReply))
	}
	keys := func(text string, lengths ...uint32) error {
		_, err := wire.FromKeys(&wirepb.Keys{Text: []byte(text), Lengths: lengths}, MaxKeys)
		return err
	}
	description := func(r *peerpb.Region) error {
		_, err := descriptionFromProto(&peerpb.DescribeReply{Regions: []*peerpb.Region{r}})
		return err
	}
	_, commitErr := commitFromProto(&peerpb.CommitRequest{Slots: []uint64{1}})
	for name, err := range map[string]error{
		"no runs":             allocated(func(p *peerpb.AllocateReply) { p.Runs = nil }),
		"a run too many":      allocated(func(p *peerpb.AllocateReply) { p.RunCounts[0]-- }),
		"counts wrap around":  allocated(func(p *peerpb.AllocateReply) { p.RunCounts = []uint32{7, math.MaxUint32, 0} }),
		"columns of runs":     allocated(func(p *peerpb.AllocateReply) { p.Runs.Offsets = p.Runs.Offsets[1:] }),
		"too few slots":       allocated(func(p *peerpb.AllocateReply) { p.Slots = p.Slots[1:] }),
		"too few values":      resolved(func(p *peerpb.ResolveReply) { p.Checksums = nil }),
		"no runs of a value":  resolved(func(p *peerpb.ResolveReply) { p.Runs = nil }),
		"key beyond the text": keys("abc", 1, 3),
		"text beyond keys":    keys("abc", 1, 1),
		"too many keys":       keys("", make([]uint32, MaxKeys+1)...),
		"unknown kind":        description(&peerpb.Region{Kind: 256}),
		"unknown right":       description(&peerpb.Region{Rights: 256}),
		"a long place":        description(&peerpb.Region{Place: strings.Repeat("g", 65)}),
		"a place to print":    description(&peerpb.Region{Place: "0000:01:00.0\x1b[2J"}),
		"no checksums":        commitErr,
	} {
		if backend.CodeOf(err) != backend.BadRequest {
			t.Errorf("%s: %v, want BadRequest", name, err)
		}
	}
}

// Whatever arrives, reading it does not panic, and what is accepted is consistent.
func FuzzFromWire(f *testing.F) {
	for _, m := range []proto.Message{
		allocatedToProto(filled[AllocateReply]()), resolvedToProto(filled[ResolveReply]()),
		allocateToProto(filled[AllocateRequest]()), commitToProto(filled[CommitRequest]()),
		descriptionToProto(filled[Description]()),
	} {
		data, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var allocated peerpb.AllocateReply
		if reply := new(AllocateReply); proto.Unmarshal(data, &allocated) == nil &&
			allocatedFromProto(&allocated, len(allocated.Statuses), reply) == nil {
			for _, s := range reply.Slots {
				_ = reply.Runs[s.FirstRun : s.FirstRun+s.RunCount]
			}
		}
		var resolved peerpb.ResolveReply
		if reply := new(ResolveReply); proto.Unmarshal(data, &resolved) == nil &&
			resolvedFromProto(&resolved, len(resolved.Statuses), reply) == nil {
			for _, v := range reply.Values {
				_ = reply.Runs[v.FirstRun : v.FirstRun+v.RunCount]
			}
		}
		var allocate peerpb.AllocateRequest
		if proto.Unmarshal(data, &allocate) == nil {
			if r, err := allocateFromProto(&allocate); err == nil && len(r.Keys) != len(allocate.GetKeys().GetLengths()) {
				t.Errorf("%d keys of %d", len(r.Keys), len(allocate.GetKeys().GetLengths()))
			}
		}
		var commit peerpb.CommitRequest
		if proto.Unmarshal(data, &commit) == nil {
			if r, err := commitFromProto(&commit); err == nil && len(r.Slots) != len(commit.Slots) {
				t.Errorf("%d slots of %d", len(r.Slots), len(commit.Slots))
			}
		}
		var description peerpb.DescribeReply
		if proto.Unmarshal(data, &description) == nil {
			if d, err := descriptionFromProto(&description); err == nil {
				for _, r := range d.Regions {
					if !backend.ValidPlace(r.Place) {
						t.Errorf("%q passes for a place", r.Place)
					}
				}
			}
		}
	})
}
