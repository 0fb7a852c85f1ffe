// Package errorpb is the generated form of error.proto.
package errorpb
