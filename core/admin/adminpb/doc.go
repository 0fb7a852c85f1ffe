// Package adminpb is the generated form of admin.proto.
package adminpb
