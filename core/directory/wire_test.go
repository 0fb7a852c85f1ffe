package directory

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	pb "github.com/umbp/umbp/core/directory/directorypb"
	"github.com/umbp/umbp/core/internal/wire"
	"github.com/umbp/umbp/core/internal/wire/wirepb"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// fill sets everything in v to a value that is not zero, and numbers and texts to ones that differ from each
// other. An int is an index into a slice of two.
func fill(v reflect.Value, n *uint64) {
	*n++
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			fill(v.Field(i), n)
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		for i := range v.Len() {
			fill(v.Index(i), n)
		}
	case reflect.String:
		v.SetString(fmt.Sprint("text ", *n))
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Uint64:
		v.SetUint(*n)
	case reflect.Int64:
		v.SetInt(int64(*n))
	case reflect.Int:
		v.SetInt(1)
	default:
		panic("fill does not know " + v.Type().String())
	}
}

// zeros returns the paths of what is zero in v.
func zeros(path string, v reflect.Value) []string {
	var found []string
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			found = append(found, zeros(path+"."+v.Type().Field(i).Name, v.Field(i))...)
		}
	case reflect.Slice:
		for i := range v.Len() {
			found = append(found, zeros(fmt.Sprintf("%s[%d]", path, i), v.Index(i))...)
		}
	}
	if v.IsZero() {
		found = append(found, path)
	}
	return found
}

// lost returns how a value of type T that is full comes back from there and back again; empty when nothing is lost.
func lost[T any, P proto.Message](to func(T) P, from func(P) (T, error)) string {
	var sent T
	fill(reflect.ValueOf(&sent).Elem(), new(uint64))
	if empty := zeros("", reflect.ValueOf(sent)); len(empty) > 0 {
		return "not filled: " + strings.Join(empty, ", ")
	}
	bytes, err := proto.Marshal(to(sent))
	if err != nil {
		return err.Error()
	}
	p := reflect.New(reflect.TypeFor[P]().Elem()).Interface().(P)
	if err := proto.Unmarshal(bytes, p); err != nil {
		return err.Error()
	}
	got, err := from(p)
	if err != nil {
		return err.Error()
	}
	return cmp.Diff(sent, got)
}

// pointed makes a conversion of *T one of T.
func pointed[T, P any](to func(*T) P) func(T) P {
	return func(v T) P { return to(&v) }
}

// valued makes a conversion to *T one to T.
func valued[T, P any](from func(P) (*T, error)) func(P) (T, error) {
	return func(p P) (T, error) {
		v, err := from(p)
		if err != nil {
			return *new(T), err
		}
		return *v, nil
	}
}

// filled makes a conversion into a reply for two keys one to T.
func filled[T, P any](from func(*T, P, int) error) func(P) (T, error) {
	return func(p P) (v T, err error) {
		err = from(&v, p, 2)
		return v, err
	}
}

// sure makes a conversion that cannot fail one that could.
func sure[T, P any](from func(P) T) func(P) (T, error) {
	return func(p P) (T, error) { return from(p), nil }
}

func TestNothingIsLostOnTheWay(t *testing.T) {
	for name, diff := range map[string]string{
		"Peer":            lost(wire.ToPeer, sure(wire.FromPeer)),
		"Node":            lost(toNode, sure(fromNode)),
		"JoinReply":       lost(toJoinReply, fromJoinReply),
		"PublishRequest":  lost(pointed(toPublishRequest), valued(fromPublishRequest)),
		"PublishReply":    lost(pointed(toPublishReply), filled(fromPublishReply)),
		"WithdrawRequest": lost(pointed(toWithdrawRequest), valued(fromWithdrawRequest)),
		"PlaceRequest":    lost(pointed(toPlaceRequest), valued(fromPlaceRequest)),
		"PlaceReply":      lost(pointed(toPlaceReply), filled(fromPlaceReply)),
		"LocateRequest":   lost(pointed(toLocateRequest), valued(fromLocateRequest)),
		"LocateReply":     lost(pointed(toLocateReply), filled(fromLocateReply)),
		"ListRequest":     lost(pointed(toListRequest), valued(sure(fromListRequest))),
		"ListReply":       lost(pointed(toListReply), valued(fromListReply)),
	} {
		if diff != "" {
			t.Errorf("%s (-sent +received):\n%s", name, diff)
		}
	}
}

// The test above proves something only if it would notice.
func TestALossIsNoticed(t *testing.T) {
	dropsHost := func(p *wirepb.Peer) (backend.Peer, error) {
		return backend.Peer{Node: p.GetNode(), Incarnation: p.GetIncarnation()}, nil
	}
	if diff := lost(wire.ToPeer, dropsHost); !strings.Contains(diff, "Host") {
		t.Errorf("a lost host reads %q", diff)
	}
	dropsPolicy := func(r PlaceRequest) *pb.PlaceRequest {
		p := toPlaceRequest(&r)
		p.Policy.Together = false
		return p
	}
	if diff := lost(dropsPolicy, valued(fromPlaceRequest)); !strings.Contains(diff, "Together") {
		t.Errorf("a lost policy reads %q", diff)
	}
	if empty := zeros("", reflect.ValueOf(Node{Address: "x"})); !slices.Contains(empty, ".Peer.Host") {
		t.Errorf("zero fields are %q", empty)
	}
}

func TestUnreadableRequests(t *testing.T) {
	d := newMemory(t, Options{})
	client := newClient(t, d)
	for what, keys := range map[string]*wirepb.Keys{
		"too short":      {Text: []byte("ab"), Lengths: []uint32{3}},
		"bytes left":     {Text: []byte("ab"), Lengths: []uint32{1}},
		"too many":       {Lengths: make([]uint32, maxMessageKeys+1)},
		"sum overflows":  {Text: []byte("ab"), Lengths: []uint32{1, 1<<32 - 1, 2}},
		"lengths absent": {Text: []byte("ab")},
	} {
		_, publishErr := client.rpc.Publish(ctx, &pb.PublishRequest{Keys: keys})
		_, withdrawErr := client.rpc.Withdraw(ctx, &pb.WithdrawRequest{Keys: keys})
		_, placeErr := client.rpc.Place(ctx, &pb.PlaceRequest{Keys: keys})
		_, locateErr := client.rpc.Locate(ctx, &pb.LocateRequest{Keys: keys})
		for call, err := range map[string]error{
			"publish": publishErr, "withdraw": withdrawErr, "place": placeErr, "locate": locateErr,
		} {
			if err == nil || !strings.Contains(err.Error(), call+": bad request: the request cannot be read") {
				t.Errorf("%s with keys %s: %v", call, what, err)
			}
		}
	}
	// Nothing in a message needs to be there.
	if _, err := client.rpc.Join(ctx, &pb.JoinRequest{}); err == nil {
		t.Error("a join of nobody is accepted")
	}
	if _, err := client.rpc.Place(ctx, &pb.PlaceRequest{Exclude: []*wirepb.Peer{nil}}); err != nil {
		t.Errorf("place of nothing: %v", err)
	}
}

// A client does not trust a directory's answer either.
func TestUnusableReplies(t *testing.T) {
	for what, err := range map[string]error{
		"publish, too few":   fromPublishReply(new(PublishReply), &pb.PublishReply{Entered: []bool{true}}, 2),
		"locate, too many":   fromLocateReply(new(LocateReply), &pb.LocateReply{At: []uint32{0, 0}}, 1),
		"locate, no node":    fromLocateReply(new(LocateReply), &pb.LocateReply{At: []uint32{1}}, 1),
		"locate, other node": fromLocateReply(new(LocateReply), &pb.LocateReply{At: []uint32{1<<32 - 1}, Nodes: []*pb.Node{{}}}, 1),
		"place, too few":     fromPlaceReply(new(PlaceReply), &pb.PlaceReply{At: []uint32{0}}, 1),
		"place, too many":    fromPlaceReply(new(PlaceReply), &pb.PlaceReply{At: []uint32{0, 0}, Exists: []bool{false}}, 1),
		"place, no node":     fromPlaceReply(new(PlaceReply), &pb.PlaceReply{At: []uint32{2}, Exists: []bool{true}, Nodes: []*pb.Node{{}}}, 1),
		"place, at no node":  fromPlaceReply(new(PlaceReply), &pb.PlaceReply{At: []uint32{0}, Exists: []bool{true}}, 1),
		"join, no time":      second(fromJoinReply(&pb.JoinReply{Membership: 1})),
		"join, no number":    second(fromJoinReply(&pb.JoinReply{TtlNs: 1})),
		"list, keys":         second(fromListReply(&pb.ListReply{Keys: &wirepb.Keys{Lengths: []uint32{1}}})),
		"list, sizes":        second(fromListReply(&pb.ListReply{Keys: wire.ToKeys([]string{"k"}), At: []uint32{0}, Nodes: []string{"n"}})),
		"list, no node":      second(fromListReply(&pb.ListReply{Keys: wire.ToKeys([]string{"k"}), At: []uint32{0}, Sizes: []uint64{1}})),
	} {
		if err == nil {
			t.Errorf("%s: accepted", what)
		}
	}
	if err := badReply("join", errTest); backend.CodeOf(err) != backend.Internal {
		t.Errorf("an unusable reply is %v", err)
	}
}

var errTest = fmt.Errorf("test")

func second[T any](_ T, err error) error { return err }
