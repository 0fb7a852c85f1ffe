package directory

import "unsafe"

// alias returns a string that changes with b, as no string should: it shows who has kept one.
func alias(b []byte) string { return unsafe.String(&b[0], len(b)) }
