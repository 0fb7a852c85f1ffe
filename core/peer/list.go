package peer

// list is a doubly linked list through hooks that its items embed, so that moving an item costs no allocation.
// The zero value is not ready: call init first.
type list[T any] struct{ root hook[T] }

// hook is an item's place in at most one list. The item's address goes into it once, when the item is made.
type hook[T any] struct {
	prev, next *hook[T]
	item       *T
}

func (l *list[T]) init() { l.root.prev, l.root.next = &l.root, &l.root }

// front returns the item that has been in the list longest, or nil.
func (l *list[T]) front() *T { return l.root.next.item }

func (l *list[T]) pushBack(h *hook[T]) {
	h.prev, h.next = l.root.prev, &l.root
	h.prev.next, h.next.prev = h, h
}

// unlink takes the item out of its list. An item in no list stays as it is.
func (h *hook[T]) unlink() {
	if h.next == nil {
		return
	}
	h.prev.next, h.next.prev = h.next, h.prev
	h.prev, h.next = nil, nil
}

// table finds records by ids that count up and are never used twice. A record stands at its id modulo the table's
// size; an id whose place is still taken by an older record is skipped. Twice as many places as records keep the
// skips rare.
type table[T any] struct {
	places []place[T]
	last   uint64
	live   int
	limit  int
}

type place[T any] struct {
	id   uint64
	item *T
}

func newTable[T any](limit int) table[T] {
	size := 1
	for size < 2*limit {
		size *= 2
	}
	return table[T]{places: make([]place[T], size), limit: limit}
}

// room is how many records more the table takes.
func (t *table[T]) room() int { return t.limit - t.live }

// add gives the record an id. The table has room.
func (t *table[T]) add(item *T) uint64 {
	for {
		t.last++
		if p := t.at(t.last); p.item == nil {
			*p = place[T]{t.last, item}
			t.live++
			return t.last
		}
	}
}

// get returns the record with the id, or nil.
func (t *table[T]) get(id uint64) *T {
	if p := t.at(id); p.id == id {
		return p.item
	}
	return nil
}

// remove forgets a record that get has just found.
func (t *table[T]) remove(id uint64) {
	*t.at(id) = place[T]{}
	t.live--
}

func (t *table[T]) at(id uint64) *place[T] { return &t.places[id&uint64(len(t.places)-1)] }
