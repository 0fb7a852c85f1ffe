// Package shape turns the segments of a transfer into few copies for a GPU's runtime. It is pure: offsets in, offsets
// out.
//
// Every call of a runtime costs microseconds, as much as the link needs for some hundred KiB: pages that go one by one
// keep the processor busy and the link idle. So the segments are joined, in three steps, in the order in which they come:
//
//   - Segments that follow each other on both sides become one piece.
//   - Pieces of one width, at one distance from each other on either side, become the rows of one grid: a 2D copy.
//   - Of what is left, the small pieces of a part become one batch, where the runtime copies batches.
//
// Pages of a pool that are gathered into one buffer show all three:
//
//	remote (sorted)  ┌─A─┐   ┌─B─┐   ┌─C─┐   ┌─D─┬─E─┐      ┌─F─┐
//	                 └───┘   └───┘   └───┘   └───┴───┘      └───┘
//	                   grid of 3 rows         piece          piece
//	local            ┌─A─┬─B─┬─C─┬─D─┬─E─┐      ┌─F─┐
//	                 └───┴───┴───┴───┴───┘      └───┘
//
// The copies are dealt into parts of about so many bytes. A part is what its owner submits, waits for and gives up as a
// whole, so that a transfer of many bytes can be stopped between two of them.
package shape

import (
	"math"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

const (
	// MinRows is the least number of rows of a grid. What takes fewer is copied piece by piece: two pieces are always at
	// one distance, and a grid of two would take its first row from a longer one that begins with the second.
	MinRows = 4
	// MaxPitch is the greatest distance between two rows. The runtimes take what a 32-bit int holds.
	MaxPitch = math.MaxInt32
)

// Limits is what a plan keeps to.
type Limits struct {
	// PartBytes is about how many bytes a part has: fewer than three times as many. Not zero. A copy has fewer than twice
	// as many: longer segments are cut.
	PartBytes uint64
	// PartOps is the most copies of one part. Not zero.
	PartOps int
	// Batch has the pieces of up to this many bytes copied in batches; with 0 there are none.
	Batch uint64
	// MinBatch is the least number of copies that a batch is worth.
	MinBatch int
}

// Op is one copy: a piece, or a grid. It has all bytes of the segments between First and Last, and some of those two.
type Op struct {
	Local, Remote           uint64 // offsets in the two regions, of the first row
	Width                   uint64 // bytes of a row, never 0
	LocalPitch, RemotePitch uint64 // from the start of a row to that of the next; 0 in a piece
	Rows                    uint32 // 1 in a piece
	First, Last             uint32 // indexes of the first and the last segment that it has bytes of
	Batched                 bool   // it goes with the others of its part that are
}

// Bytes returns how many bytes the copy has.
func (o *Op) Bytes() uint64 { return o.Width * uint64(o.Rows) }

// Part is a run of copies.
type Part struct {
	First, Count uint32 // indexes of Plan.Ops
	Batched      uint32 // how many of them are batched
	Bytes        uint64
}

// Plan is a list of copies in the order of the segments, and of the parts that have all of them. The zero Plan is ready
// for use; one that is used again allocates nothing once it has grown large enough.
type Plan struct {
	Ops   []Op
	Parts []Part
}

// Cut replaces the plan by one for segments. They lie within regions of less than 2⁶³ bytes, and their lengths are not
// zero: the caller has checked that. Those that are sorted by one side make the best plan; any order makes a right one.
func (p *Plan) Cut(segments []backend.Segment, l Limits) {
	p.Ops, p.Parts = p.Ops[:0], p.Parts[:0]
	c := cutter{plan: p, limits: l, widest: l.PartBytes / MinRows}
	var piece Op // what may still grow; Width is 0 at first
	for i := range segments {
		s := &segments[i]
		if piece.Width == 0 || piece.Width >= l.PartBytes ||
			s.Local != piece.Local+piece.Width || s.Remote != piece.Remote+piece.Width {
			if piece.Width > 0 {
				c.add(&piece)
			}
			piece = Op{Local: s.Local, Remote: s.Remote, Rows: 1, First: uint32(i)}
		}
		// The piece had fewer bytes than a part: what is cut off ends within this segment.
		piece.Width += s.Length
		piece.Last = uint32(i)
		for piece.Width >= 2*l.PartBytes {
			rest := piece
			rest.Local, rest.Remote, rest.Width = rest.Local+l.PartBytes, rest.Remote+l.PartBytes, rest.Width-l.PartBytes
			rest.First = uint32(i)
			piece.Width = l.PartBytes
			c.add(&piece)
			piece = rest
		}
	}
	if piece.Width > 0 {
		c.add(&piece)
	}
	c.endRun()
	c.endPart()
}

// cutter joins pieces to grids, and deals copies into parts.
type cutter struct {
	plan   *Plan
	limits Limits
	widest uint64 // bytes of a row

	// The run of pieces that may become a grid. The first few of them are kept, for they go one by one where it does not.
	run  Op
	head [MinRows - 1]Op

	part Part
}

// add takes the next piece.
func (c *cutter) add(piece *Op) {
	if c.extend(piece) {
		return
	}
	if r := &c.run; r.Rows > 1 && r.Rows < MinRows {
		// Too short for a grid. Its last piece may begin another one.
		for i := range r.Rows - 1 {
			c.emit(&c.head[i])
		}
		c.run = c.head[r.Rows-1]
		c.head[0] = c.run
		if c.extend(piece) {
			return
		}
	}
	c.endRun()
	if piece.Width > c.widest {
		c.emit(piece)
		return
	}
	c.run, c.head[0] = *piece, *piece
}

// extend makes the piece the next row of the run, if it can be.
func (c *cutter) extend(piece *Op) bool {
	r := &c.run
	switch {
	case r.Rows == 0 || piece.Width != r.Width:
		return false
	case r.Rows == 1:
		// Offsets are below 2⁶³: a distance backwards comes out greater than any pitch.
		local, remote := piece.Local-r.Local, piece.Remote-r.Remote
		if local < r.Width || local > MaxPitch || remote < r.Width || remote > MaxPitch {
			return false
		}
		r.LocalPitch, r.RemotePitch = local, remote
	default:
		n := uint64(r.Rows)
		if piece.Local != r.Local+n*r.LocalPitch || piece.Remote != r.Remote+n*r.RemotePitch {
			return false
		}
	}
	if r.Rows < MinRows-1 {
		c.head[r.Rows] = *piece
	}
	r.Rows++
	r.Last = piece.Last
	if r.Bytes() > c.limits.PartBytes-r.Width {
		c.emit(r)
		r.Rows = 0
	}
	return true
}

// endRun ends the run: as a grid where it has the rows, and else piece by piece.
func (c *cutter) endRun() {
	if r := &c.run; r.Rows >= MinRows {
		c.emit(r)
	} else {
		for i := range r.Rows {
			c.emit(&c.head[i])
		}
	}
	c.run.Rows = 0
}

// emit appends a copy to the part.
func (c *cutter) emit(o *Op) {
	p := c.plan
	p.Ops = append(p.Ops, *o)
	own := &p.Ops[len(p.Ops)-1]
	if own.Rows == 1 {
		own.LocalPitch, own.RemotePitch = 0, 0
		if own.Batched = own.Width <= c.limits.Batch; own.Batched {
			c.part.Batched++
		}
	}
	c.part.Count++
	c.part.Bytes += own.Bytes()
	if c.part.Bytes >= c.limits.PartBytes || int(c.part.Count) >= c.limits.PartOps {
		c.endPart()
	}
}

// endPart ends the part, unless it is empty.
func (c *cutter) endPart() {
	if c.part.Count == 0 {
		return
	}
	if int(c.part.Batched) < c.limits.MinBatch {
		for i := range c.part.Count {
			c.plan.Ops[c.part.First+i].Batched = false
		}
		c.part.Batched = 0
	}
	c.plan.Parts = append(c.plan.Parts, c.part)
	c.part = Part{First: uint32(len(c.plan.Ops))}
}
