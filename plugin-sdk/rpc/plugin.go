package rpc

import (
	"context"

	"github.com/hashicorp/go-plugin"
	"google.golang.org/grpc"
)

// Handshake tells a plugin that it was started by a host, and not by hand. It keeps no secret.
var Handshake = plugin.HandshakeConfig{
	MagicCookieKey:   "UMBP_BACKEND_PLUGIN",
	MagicCookieValue: "3d1f0c6f-8f7e-4f3c-9a52-1c6c2a5b7d10",
}

// ProtocolVersions are the versions of the protocol that this package speaks, as host and as plugin, newest last.
// Version 1 is the service umbp.backend.v1.Backend.
var ProtocolVersions = []int{1}

// PluginName is how go-plugin calls the one service that a plugin serves.
const PluginName = "backend"

// EnvPassage names the environment variable in which a plugin finds the number of the descriptor of its end of the
// passage (shm.OpenPassage). Without it no descriptors can be passed.
const EnvPassage = "UMBP_PLUGIN_PASSAGE_FD"

// Plugin is the backend service as go-plugin knows it. A host leaves Backend nil; what it gets when it dispenses the
// plugin is the *grpc.ClientConn for Options.Conn.
type Plugin struct {
	plugin.NetRPCUnsupportedPlugin
	Backend *Server
}

var _ plugin.GRPCPlugin = (*Plugin)(nil)

// VersionedPlugins offers the service under every protocol version, for plugin.ServeConfig and plugin.ClientConfig.
// server is nil in a host.
func VersionedPlugins(server *Server) map[int]plugin.PluginSet {
	sets := make(map[int]plugin.PluginSet, len(ProtocolVersions))
	for _, version := range ProtocolVersions {
		sets[version] = plugin.PluginSet{PluginName: &Plugin{Backend: server}}
	}
	return sets
}

// GRPCServer implements plugin.GRPCPlugin.
func (p *Plugin) GRPCServer(_ *plugin.GRPCBroker, s *grpc.Server) error {
	p.Backend.Register(s)
	return nil
}

// GRPCClient implements plugin.GRPCPlugin.
func (p *Plugin) GRPCClient(_ context.Context, _ *plugin.GRPCBroker, conn *grpc.ClientConn) (any, error) {
	return conn, nil
}
