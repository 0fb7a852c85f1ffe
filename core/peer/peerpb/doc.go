// Package peerpb is the generated form of peer.proto.
package peerpb
