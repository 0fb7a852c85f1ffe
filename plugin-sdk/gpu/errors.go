package gpu

import (
	"errors"
	"fmt"
	"strings"
)

// Missing is why there is no runtime to work with.
type Missing struct {
	Runtime string   // "hip" or "cuda"; empty where both were looked for: Each says it of each
	Library string   // the file of the library; empty when none was found
	Version string   // of the library, as in 5.2; empty when it was not found or did not tell
	What    string   // what is missing
	Looked  []string // where a library was looked for; empty when it was found
	Remedy  string   // what to do about it
	Each    []*Missing
}

func (m *Missing) Error() string {
	var b strings.Builder
	b.WriteString(m.What)
	if len(m.Looked) > 0 {
		b.WriteString("; looked in " + strings.Join(m.Looked, ", "))
	}
	for i, each := range m.Each {
		b.WriteString([]string{": ", "; "}[min(i, 1)] + each.Error())
	}
	return b.String()
}

// Error is what a call of the runtime returned.
type Error struct {
	Runtime string // "hip" or "cuda"
	Call    string // the function, as in hipMemcpyAsync
	Code    int
	Name    string // of the code, as the runtime writes it: hipErrorInvalidValue
	Text    string // the runtime's sentence for it; may be the name again
	Device  int    // the number of the device that the call was made for; -1 where it was for none
}

func (e *Error) Error() string {
	s := e.Call
	if e.Device >= 0 {
		s += fmt.Sprintf(" on device %d", e.Device)
	}
	s += fmt.Sprintf(": %s (%d)", e.Name, e.Code)
	if e.Text != "" && e.Text != e.Name {
		s += ": " + e.Text
	}
	return s
}

// Codes that are no failure, or that say more than that a call failed. They are the same in HIP (hip_runtime_api.h, 5.2 to
// 7) and CUDA (driver_types.h, 11 to 13).
const (
	success             = 0
	codeNewerDriver     = 36 // cudaErrorCallRequiresNewerDriver; HIP has no such code
	codeInvalidContext  = 201
	codePeerUnsupported = 217
	codeNotReady        = 600
	codePeerEnabled     = 704
	codeHostRegistered  = 712
	codeNotSupported    = 801
)

// lostHIP and lostCUDA are the codes after which a device is not to be used any more by this process. Sources:
// hip_runtime_api.h of HIP 5.2, 6.4 and 7; driver_types.h of CUDA 12.4 and 13.1, whose words are quoted.
//
// Not among them, though it sounds so: HIP's 709, hipErrorContextIsDestroyed, which its calls return for a stream that
// does not exist (clr, hip_memory.cpp); 101, invalid device, which HIP returns for a peer out of reach
// (clr, hip_peer.cpp); 201, which both return for a handle that is imported where it was made; 999, unknown error, which
// may be anything.
var (
	lostHIP = map[int]bool{
		3:   true, // hipErrorNotInitialized
		4:   true, // hipErrorDeinitialized
		100: true, // hipErrorNoDevice, after there was one
		214: true, // hipErrorECCNotCorrectable
		700: true, // hipErrorIllegalAddress: the device's queue has ended
		702: true, // hipErrorLaunchTimeOut
		710: true, // hipErrorAssert
		719: true, // hipErrorLaunchFailure: "An exception occurred on the device while executing a kernel."
	}
	lostCUDA = map[int]bool{
		3:   true, // cudaErrorInitializationError
		4:   true, // cudaErrorCudartUnloading
		46:  true, // cudaErrorDevicesUnavailable, after it was available
		100: true, // cudaErrorNoDevice, after there was one
		214: true, // cudaErrorECCUncorrectable
		220: true, // cudaErrorNvlinkUncorrectable
		226: true, // cudaErrorContained (since CUDA 12.8): an error in hardware that the GPU has contained
		709: true, // cudaErrorContextIsDestroyed: cudaDeviceReset by another part of the process
		// "This leaves the process in an inconsistent state and any further CUDA work will return the same error. To
		// continue using CUDA, the process must be terminated and relaunched.":
		700: true, // cudaErrorIllegalAddress
		702: true, // cudaErrorLaunchTimeout
		710: true, // cudaErrorAssert
		714: true, // cudaErrorHardwareStackError
		715: true, // cudaErrorIllegalInstruction
		716: true, // cudaErrorMisalignedAddress
		717: true, // cudaErrorInvalidAddressSpace
		718: true, // cudaErrorInvalidPc
		719: true, // cudaErrorLaunchFailure
		721: true, // cudaErrorTensorMemoryLeak (since CUDA 12.8)
		810: true, // cudaErrorMpsClientTerminated
		911: true, // cudaErrorExternalDevice; HIP's 911 is another
	}
)

// Lost tells whether err says that the device, or the process's use of it, is beyond repair.
func Lost(err error) bool {
	var e *Error
	if !errors.As(err, &e) {
		return false
	}
	if e.Runtime == hip.name {
		return lostHIP[e.Code]
	}
	return lostCUDA[e.Code]
}
