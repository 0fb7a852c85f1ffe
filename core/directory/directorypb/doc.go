// Package directorypb is the generated form of directory.proto.
package directorypb
