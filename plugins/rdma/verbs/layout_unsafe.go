//go:build cgo

package verbs

/*
#include "verbs.h"
*/
import "C"

import (
	"unsafe"

	"github.com/umbp/umbp/plugins/rdma/device"
)

// The compiler holds Go's layouts against those of C: an index other than zero is out of range, and a difference below
// zero is no constant index either.
var (
	same = [1]struct{}{}

	_ = same[unsafe.Sizeof(device.WR{})-unsafe.Sizeof(C.struct_umbp_wr{})]
	_ = same[unsafe.Offsetof(device.WR{}.ID)-unsafe.Offsetof(C.struct_umbp_wr{}.id)]
	_ = same[unsafe.Offsetof(device.WR{}.Remote)-unsafe.Offsetof(C.struct_umbp_wr{}.remote)]
	_ = same[unsafe.Offsetof(device.WR{}.RKey)-unsafe.Offsetof(C.struct_umbp_wr{}.rkey)]
	_ = same[unsafe.Offsetof(device.WR{}.FirstSGE)-unsafe.Offsetof(C.struct_umbp_wr{}.first_sge)]
	_ = same[unsafe.Offsetof(device.WR{}.SGEs)-unsafe.Offsetof(C.struct_umbp_wr{}.sges)]
	_ = same[unsafe.Offsetof(device.WR{}.Op)-unsafe.Offsetof(C.struct_umbp_wr{}.op)]
	_ = same[unsafe.Offsetof(device.WR{}.Signaled)-unsafe.Offsetof(C.struct_umbp_wr{}.signaled)]

	_ = same[unsafe.Sizeof(device.SGE{})-unsafe.Sizeof(C.struct_ibv_sge{})]
	_ = same[unsafe.Offsetof(device.SGE{}.Addr)-unsafe.Offsetof(C.struct_ibv_sge{}.addr)]
	_ = same[unsafe.Offsetof(device.SGE{}.Length)-unsafe.Offsetof(C.struct_ibv_sge{}.length)]
	_ = same[unsafe.Offsetof(device.SGE{}.LKey)-unsafe.Offsetof(C.struct_ibv_sge{}.lkey)]

	_ = same[unsafe.Sizeof(device.Completion{})-unsafe.Sizeof(C.struct_umbp_completion{})]
	_ = same[unsafe.Offsetof(device.Completion{}.ID)-unsafe.Offsetof(C.struct_umbp_completion{}.id)]
	_ = same[unsafe.Offsetof(device.Completion{}.QPN)-unsafe.Offsetof(C.struct_umbp_completion{}.qpn)]
	_ = same[unsafe.Offsetof(device.Completion{}.Status)-unsafe.Offsetof(C.struct_umbp_completion{}.status)]
	_ = same[unsafe.Offsetof(device.Completion{}.Vendor)-unsafe.Offsetof(C.struct_umbp_completion{}.vendor)]

	_ = same[device.MaxPoll-C.UMBP_MAX_POLL]
	_ = same[device.Write-C.UMBP_WRITE]
	_ = same[device.Read-C.UMBP_READ]
)
