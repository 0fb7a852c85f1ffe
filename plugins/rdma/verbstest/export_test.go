package verbstest

// Address is where memory starts, as work requests name it.
var Address = address
