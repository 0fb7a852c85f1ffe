package gpu

import (
	"fmt"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/ebitengine/purego"
)

// kind is what sets one runtime apart from the other.
type kind struct {
	name  string // "hip"; what its functions' names begin with, too
	title string // for people
	// driverPrefix is what the names begin with of the functions that CUDA has in its driver only.
	driverPrefix string
	// libraries are the names of the library, the newest first and the one without a version last; driver is that of the
	// driver's, where it is one apart.
	libraries []string
	driver    string
	// environment are the variables that name a folder where it is installed, and folders where it is by default.
	environment, folders []string
	version              func(n int) string
	// ipcFlags is what the import of a handle takes, and hostMemory how the runtime calls host memory, by version.
	ipcFlags   func(version int) uint32
	hostMemory func(version int) uint32
	// batchBefore is the first version that may take the arguments of a batch otherwise than is known here.
	batchBefore int
	// What to do where the library, the driver, or a device is missing, or has to be hidden.
	install, installDriver, permit, hide string
}

var hip = &kind{
	name:         "hip",
	title:        "HIP",
	driverPrefix: "hip",
	libraries:    []string{"libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so.5", "libamdhip64.so"},
	environment:  []string{"ROCM_PATH", "HIP_PATH"},
	// ROCm up to 7 lies in /opt/rocm-6.4.0, its packages since in /opt/rocm/core-7.14.
	folders: []string{"/opt/rocm/lib", "/opt/rocm/core/lib", "/opt/rocm/core-*/lib", "/opt/rocm-*/lib"},
	// HIP_VERSION: 5.2.21153 is 50221153.
	version:    func(n int) string { return fmt.Sprintf("%d.%d", n/10_000_000, n/100_000%100) },
	ipcFlags:   sinceHIP6, // hipIpcMemLazyEnablePeerAccess, the only value that is taken
	hostMemory: sinceHIP6, // hipMemoryTypeHost
	// hipMemcpyBatchAsync came with 7.1 and is the same in 7.15, of ROCm 10. CUDA has changed its own with a major version.
	batchBefore: 80_000_000,
	install:     "install ROCm's HIP runtime (package hip-runtime-amd; libamdhip64-5 or later on Debian), or name its library",
	permit: "see that /dev/kfd and /dev/dri/renderD* are there and that this user may open them (groups render and video), " +
		"and that neither HIP_VISIBLE_DEVICES nor ROCR_VISIBLE_DEVICES hides the GPU",
	hide: "show one of them to this process, with HIP_VISIBLE_DEVICES",
}

var cuda = &kind{
	name:         "cuda",
	title:        "CUDA",
	driverPrefix: "cu",
	libraries:    []string{"libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so"},
	driver:       "libcuda.so.1",
	environment:  []string{"CUDA_HOME", "CUDA_PATH"},
	folders:      []string{"/usr/local/cuda/lib64", "/usr/local/cuda-*/lib64"},
	// CUDART_VERSION: 12.4 is 12040.
	version:     func(n int) string { return fmt.Sprintf("%d.%d", n/1000, n%1000/10) },
	ipcFlags:    func(int) uint32 { return 1 }, // cudaIpcMemLazyEnablePeerAccess
	hostMemory:  func(int) uint32 { return 1 }, // CU_MEMORYTYPE_HOST
	batchBefore: 14000,
	// NVIDIA's driver comes without it.
	install: "install CUDA's runtime (package cuda-cudart-12-8 or another version of NVIDIA's, libcudart12 of Debian's, " +
		"nvidia-cuda-runtime-cu12 of Python's, which is not looked for), or name its library",
	installDriver: "install NVIDIA's driver",
	permit: "see that nvidia-smi lists the GPU, that the driver is new enough for this CUDA (or name the library of an older " +
		"one), that this user may open /dev/nvidia*, that CUDA_VISIBLE_DEVICES does not hide the GPU, and, where GPUs are " +
		"joined by NVSwitch, that the fabric manager runs",
	hide: "show one of them to this process, with CUDA_VISIBLE_DEVICES",
}

// sinceHIP6 is for numbers that were 0 up to HIP 5.7, and are 1 from 6.0 on.
func sinceHIP6(version int) uint32 {
	if version < 60_000_000 {
		return 0
	}
	return 1
}

// callable tells whether purego passes structures by value here, as handles are. Where it does not, there are no runtimes.
func callable() bool { return slices.Contains([]string{"amd64", "arm64", "ppc64le"}, runtime.GOARCH) }

// kinds returns the runtimes that the options ask for. The name of a library may say which one it is of.
func (o *Options) kinds() ([]*kind, error) {
	switch o.Runtime {
	case "":
		for _, k := range []*kind{hip, cuda} {
			if o.Library != "" && strings.HasPrefix(filepath.Base(o.Library), k.libraries[len(k.libraries)-1]) {
				return []*kind{k}, nil
			}
		}
		return []*kind{hip, cuda}, nil
	case hip.name:
		return []*kind{hip}, nil
	case cuda.name:
		return []*kind{cuda}, nil
	}
	return nil, fmt.Errorf("gpu: runtime %q: want hip, cuda, or nothing for either", o.Runtime)
}

// Numbers that are the same in both runtimes, in all versions that are looked for. Sources: hip_runtime_api.h and
// driver_types.h of HIP 5.2, 6.4 and 7; driver_types.h and cuda.h of CUDA 11 to 13.
const (
	memcpyDefault         = 4 // hipMemcpyDefault, cudaMemcpyDefault: the direction follows from the addresses
	streamNonBlocking     = 1
	eventDisableTiming    = 2
	registerPortable      = 1
	registerMapped        = 2
	pointerMemoryType     = 2 // HIP_, CU_POINTER_ATTRIBUTE_MEMORY_TYPE
	pointerDeviceOrdinal  = 9 // HIP_, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
	accessOrderStream     = 1 // cudaMemcpySrcAccessOrderStream
	cudaBatchWithoutIndex = 13000
	// cudaNativeAtomicSupported is cudaDevP2PAttrNativeAtomicSupported. HIP's attributes have other numbers.
	cudaNativeAtomicSupported = 3
)

// hsaLinks are the links' types as HIP gives them: hsa_amd_link_info_type_t of hsa_ext_amd.h.
var hsaLinks = map[uint32]string{0: "HyperTransport", 1: "QPI", 2: "PCIe", 3: "InfiniBand", 4: "XGMI"}

// ipcHandle is hipIpcMemHandle_t and cudaIpcMemHandle_t, which are passed by value.
type ipcHandle struct{ Reserved Handle }

// calls are the functions of a runtime. What is called often is an address, for purego.SyscallN, which allocates nothing;
// the others are functions that purego makes, which take care of what they point to. All return a code but where noted.
type calls struct {
	runtimeVersion        func(version *int32) int32
	getErrorName          func(code int32) string
	getErrorString        func(code int32) string
	initialize            func(flags uint32) int32
	getDeviceCount        func(n *int32) int32
	setDevice             func(device int32) int32
	deviceGet             func(handle *int32, number int32) int32
	deviceGetName         func(name []byte, size, handle int32) int32
	deviceTotalMem        func(bytes *uint64, handle int32) int32
	deviceGetPCIBusID     func(address []byte, size, device int32) int32
	deviceCanAccessPeer   func(access *int32, device, peer int32) int32
	deviceEnablePeer      func(peer int32, flags uint32) int32
	linkTypeAndHops       func(from, to int32, typ, hops *uint32) int32
	deviceGetP2PAttribute func(value *int32, attribute, from, to int32) int32
	pointerGetAttribute   func(value *uint64, attribute int32, address uint64) int32
	memGetAddressRange    func(base, size *uint64, address uint64) int32
	malloc                func(address *uint64, size uint64) int32
	free                  func(address uint64) int32
	load                  func(to []byte, from, size uint64, kind int32) int32
	store                 func(to uint64, from []byte, size uint64, kind int32) int32
	hostRegister          func(address, size uint64, flags uint32) int32
	hostUnregister        func(address uint64) int32
	hostGetDevicePointer  func(device *uint64, host uint64, flags uint32) int32
	ipcGetMemHandle       func(h *ipcHandle, address uint64) int32
	ipcOpenMemHandle      func(address *uint64, h ipcHandle, flags uint32) int32
	ipcCloseMemHandle     func(address uint64) int32
	streamCreate          func(s *Stream, flags uint32) int32
	streamDestroy         func(s Stream) int32
	streamSynchronize     func(s Stream) int32
	eventCreate           func(e *Event, flags uint32) int32
	eventDestroy          func(e Event) int32

	eventRecord      uintptr
	eventQuery       uintptr
	memcpyAsync      uintptr
	memcpy2DAsync    uintptr
	memcpyBatchAsync uintptr
}

// symbol says which function goes where. An empty name says that the runtime has none.
type symbol struct {
	to        any // *func or *uintptr
	hip, cuda string
	optional  bool
}

// symbols are all but the version's, which is asked for first. Names of CUDA's that do not begin with cuda are its
// driver's.
func (c *calls) symbols() []symbol {
	return []symbol{
		{to: &c.getErrorName, hip: "hipGetErrorName", cuda: "cudaGetErrorName"},
		{to: &c.getErrorString, hip: "hipGetErrorString", cuda: "cudaGetErrorString"},
		{to: &c.initialize, hip: "hipInit", cuda: "cuInit"},
		{to: &c.getDeviceCount, hip: "hipGetDeviceCount", cuda: "cudaGetDeviceCount"},
		{to: &c.setDevice, hip: "hipSetDevice", cuda: "cudaSetDevice"},
		{to: &c.deviceGet, hip: "hipDeviceGet", cuda: "cuDeviceGet"},
		{to: &c.deviceGetName, hip: "hipDeviceGetName", cuda: "cuDeviceGetName"},
		{to: &c.deviceTotalMem, hip: "hipDeviceTotalMem", cuda: "cuDeviceTotalMem_v2"},
		{to: &c.deviceGetPCIBusID, hip: "hipDeviceGetPCIBusId", cuda: "cudaDeviceGetPCIBusId"},
		{to: &c.deviceCanAccessPeer, hip: "hipDeviceCanAccessPeer", cuda: "cudaDeviceCanAccessPeer"},
		{to: &c.deviceEnablePeer, hip: "hipDeviceEnablePeerAccess", cuda: "cudaDeviceEnablePeerAccess"},
		{to: &c.linkTypeAndHops, hip: "hipExtGetLinkTypeAndHopCount", optional: true},
		{to: &c.deviceGetP2PAttribute, cuda: "cudaDeviceGetP2PAttribute", optional: true},
		{to: &c.pointerGetAttribute, hip: "hipPointerGetAttribute", cuda: "cuPointerGetAttribute"},
		{to: &c.memGetAddressRange, hip: "hipMemGetAddressRange", cuda: "cuMemGetAddressRange_v2"},
		{to: &c.malloc, hip: "hipMalloc", cuda: "cudaMalloc"},
		{to: &c.free, hip: "hipFree", cuda: "cudaFree"},
		{to: &c.load, hip: "hipMemcpy", cuda: "cudaMemcpy"},
		{to: &c.store, hip: "hipMemcpy", cuda: "cudaMemcpy"},
		{to: &c.hostRegister, hip: "hipHostRegister", cuda: "cudaHostRegister"},
		{to: &c.hostUnregister, hip: "hipHostUnregister", cuda: "cudaHostUnregister"},
		{to: &c.hostGetDevicePointer, hip: "hipHostGetDevicePointer", cuda: "cudaHostGetDevicePointer"},
		{to: &c.ipcGetMemHandle, hip: "hipIpcGetMemHandle", cuda: "cudaIpcGetMemHandle"},
		{to: &c.ipcOpenMemHandle, hip: "hipIpcOpenMemHandle", cuda: "cudaIpcOpenMemHandle"},
		{to: &c.ipcCloseMemHandle, hip: "hipIpcCloseMemHandle", cuda: "cudaIpcCloseMemHandle"},
		{to: &c.streamCreate, hip: "hipStreamCreateWithFlags", cuda: "cudaStreamCreateWithFlags"},
		{to: &c.streamDestroy, hip: "hipStreamDestroy", cuda: "cudaStreamDestroy"},
		{to: &c.streamSynchronize, hip: "hipStreamSynchronize", cuda: "cudaStreamSynchronize"},
		{to: &c.eventCreate, hip: "hipEventCreateWithFlags", cuda: "cudaEventCreateWithFlags"},
		{to: &c.eventDestroy, hip: "hipEventDestroy", cuda: "cudaEventDestroy"},
		{to: &c.eventRecord, hip: "hipEventRecord", cuda: "cudaEventRecord"},
		{to: &c.eventQuery, hip: "hipEventQuery", cuda: "cudaEventQuery"},
		{to: &c.memcpyAsync, hip: "hipMemcpyAsync", cuda: "cudaMemcpyAsync"},
		{to: &c.memcpy2DAsync, hip: "hipMemcpy2DAsync", cuda: "cudaMemcpy2DAsync"},
		{to: &c.memcpyBatchAsync, hip: "hipMemcpyBatchAsync", cuda: "cudaMemcpyBatchAsync", optional: true},
	}
}

// bind looks all functions up, and returns the names of those that had to be there and are not.
func (c *calls) bind(k *kind, lib, driver library) (lacking []string) {
	for _, s := range c.symbols() {
		name, from := s.hip, lib
		if k == cuda {
			name = s.cuda
			if !strings.HasPrefix(name, cuda.name) {
				from = driver
			}
		}
		if name == "" {
			continue
		}
		switch address := from.symbol(name); {
		case address != 0:
			assign(s.to, address)
		case !s.optional:
			lacking = append(lacking, name)
		}
	}
	return lacking
}

// assign makes a function of the one at an address, or keeps the address.
func assign(to any, address uintptr) {
	if p, ok := to.(*uintptr); ok {
		*p = address
		return
	}
	purego.RegisterFunc(to, address)
}
