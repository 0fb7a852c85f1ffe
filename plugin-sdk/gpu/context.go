package gpu

import (
	"fmt"
	"runtime"
)

// Stream and Event are the runtime's.
type (
	Stream uintptr
	Event  uintptr
)

// Context is a thread that belongs to a device. Its methods are called by the goroutine only that it was bound by.
type Context struct {
	r      *Runtime
	device int
	batch  *batch
	// arguments is room for those of a call.
	arguments []uintptr
}

// Bind locks the calling goroutine to its thread and makes the device the thread's own. It is meant for a goroutine that
// is made for it: see Unbind.
func (r *Runtime) Bind(device int) (*Context, error) {
	if err := r.known(device); err != nil {
		return nil, err
	}
	select {
	case <-r.closed:
		return nil, errClosed
	default:
	}
	c := &Context{r: r, device: device}
	if err := c.bind(); err != nil {
		return nil, err
	}
	return c, nil
}

// bind locks the goroutine to its thread for good, and tells the runtime of the device.
func (c *Context) bind() error {
	runtime.LockOSThread()
	if c.device == noDevice {
		return nil
	}
	if err := c.check("SetDevice", c.r.calls.setDevice(int32(c.device))); err != nil || c.r.kind == hip {
		return err
	}
	// Before 12, CUDA's thread has no context, which the driver's calls need, until the runtime has been called in
	// earnest. To free nothing is the call that is made for that.
	return c.check("Free", c.r.calls.free(0))
}

// Unbind ends the use of the Context. The goroutine stays locked to its thread, so that the thread ends with it: the
// runtime would not let go of the device on it, and no other goroutine is to find itself there.
func (c *Context) Unbind() { *c = Context{} }

// Range returns the allocation, or the mapping of one, that an address of this process lies in.
func (c *Context) Range(address uint64) (base, size uint64, err error) {
	err = c.checkDriver("MemGetAddressRange", c.r.calls.memGetAddressRange(&base, &size, address))
	return base, size, err
}

// Import maps an allocation of another process, and returns where its first byte is; Unimport ends that. What the handle
// says of its size is not known here: see Range.
func (c *Context) Import(h Handle) (address uint64, err error) {
	flags := c.r.kind.ipcFlags(c.r.version)
	err = c.check("IpcOpenMemHandle", c.r.calls.ipcOpenMemHandle(&address, ipcHandle{h}, flags))
	return address, err
}

// Unimport ends a mapping that Import made.
func (c *Context) Unimport(address uint64) error {
	return c.check("IpcCloseMemHandle", c.r.calls.ipcCloseMemHandle(address))
}

// EnablePeer lets the device address the memory of another one. Once is enough; twice is no error.
func (c *Context) EnablePeer(other int) error {
	if err := c.r.known(other); err != nil {
		return err
	}
	if other == c.device {
		return nil
	}
	// Asked first, since HIP has the same code for a device that cannot be reached and one that is not there.
	var access int32
	if err := c.check("DeviceCanAccessPeer", c.r.calls.deviceCanAccessPeer(&access, int32(c.device), int32(other))); err != nil {
		return err
	}
	code := int32(codePeerUnsupported)
	if access != 0 {
		code = c.r.calls.deviceEnablePeer(int32(other), 0)
	}
	if code == codePeerEnabled {
		return nil
	}
	return c.check("DeviceEnablePeerAccess", code)
}

// pin is memory that is pinned, by us or by somebody else.
type pin struct {
	size   int
	users  int
	theirs bool // was pinned already
}

// Pin makes host memory reachable by every device, at the address that it returns, which is its own; Unpin ends that.
// Memory that is not pinned can be copied, too, but a copy may then return only when it is done. Memory can be pinned
// more than once, the same bytes each time, and is let go of by the last Unpin, until when it has to stay mapped.
func (c *Context) Pin(memory []byte) (address uint64, err error) {
	if len(memory) == 0 {
		return 0, fmt.Errorf("gpu: no memory to pin")
	}
	address = addressOf(memory)
	r := c.r
	r.pinning.Lock()
	defer r.pinning.Unlock()
	if p := r.pins[address]; p != nil {
		if p.size != len(memory) {
			return 0, fmt.Errorf("gpu: the memory at %#x is pinned with %d bytes, and cannot be with %d", address, p.size, len(memory))
		}
		p.users++
		return address, nil
	}
	p := &pin{size: len(memory), users: 1, theirs: c.pinned(address, uint64(len(memory)))}
	if !p.theirs {
		// Read-only mappings are refused by these flags. The one for them, 8, is refused by many devices, and what it
		// would bring is no more than what is lost without.
		code := r.calls.hostRegister(address, uint64(len(memory)), registerPortable|registerMapped)
		if code == codeHostRegistered {
			return 0, fmt.Errorf("gpu: a part of the %d bytes at %#x is pinned already: %w", len(memory), address, c.check("HostRegister", code))
		}
		if err := c.check("HostRegister", code); err != nil {
			return 0, err
		}
	}
	r.pins[address] = p
	return address, nil
}

// pinned tells whether a range is pinned: its first byte and its last are, in one piece.
func (c *Context) pinned(address, size uint64) bool {
	var first, last uint64
	return c.r.calls.hostGetDevicePointer(&first, address, 0) == success &&
		c.r.calls.hostGetDevicePointer(&last, address+size-1, 0) == success &&
		last-first == size-1
}

// Unpin ends what a Pin of the same memory began.
func (c *Context) Unpin(memory []byte) error {
	if len(memory) == 0 {
		return fmt.Errorf("gpu: no memory to unpin")
	}
	address := addressOf(memory)
	r := c.r
	r.pinning.Lock()
	defer r.pinning.Unlock()
	p := r.pins[address]
	if p == nil || p.size != len(memory) {
		return fmt.Errorf("gpu: the %d bytes at %#x are not pinned", len(memory), address)
	}
	if p.users--; p.users > 0 {
		return nil
	}
	delete(r.pins, address)
	if p.theirs {
		return nil
	}
	return c.check("HostUnregister", r.calls.hostUnregister(address))
}

// NewStream makes a stream of the device, which does not wait for the device's default stream, nor it for this one.
func (c *Context) NewStream() (Stream, error) {
	var s Stream
	err := c.check("StreamCreateWithFlags", c.r.calls.streamCreate(&s, streamNonBlocking))
	return s, err
}

// DestroyStream gives a stream back. What was enqueued on it is still carried out.
func (c *Context) DestroyStream(s Stream) error {
	return c.check("StreamDestroy", c.r.calls.streamDestroy(s))
}

// NewEvent makes an event, which keeps no time.
func (c *Context) NewEvent() (Event, error) {
	var e Event
	err := c.check("EventCreateWithFlags", c.r.calls.eventCreate(&e, eventDisableTiming))
	return e, err
}

// DestroyEvent gives an event back.
func (c *Context) DestroyEvent(e Event) error {
	return c.check("EventDestroy", c.r.calls.eventDestroy(e))
}

// Wait returns when everything that was enqueued on a stream has been done, or with the error that it ended with.
func (c *Context) Wait(s Stream) error {
	return c.check("StreamSynchronize", c.r.calls.streamSynchronize(s))
}

// check makes an error of a code.
func (c *Context) check(call string, code int32) error {
	if code == success {
		return nil
	}
	return c.failed(c.r.kind.name+call, code)
}

// checkDriver is check for what CUDA has in its driver. The driver's codes and the runtime's are the same.
func (c *Context) checkDriver(call string, code int32) error {
	if code == success {
		return nil
	}
	return c.failed(c.r.kind.driverPrefix+call, code)
}

func (c *Context) failed(call string, code int32) *Error {
	return &Error{
		Runtime: c.r.kind.name,
		Call:    call,
		Code:    int(code),
		Name:    c.r.calls.getErrorName(code),
		Text:    c.r.calls.getErrorString(code),
		Device:  c.device,
	}
}
