package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/umbp/umbp/config"
	"github.com/umbp/umbp/core/host"
	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugins/shm"
	"github.com/umbp/umbp/plugins/tcp"
)

// factories are the backends that are linked in.
var factories = []backend.Factory{shm.Factory, tcp.Factory}

// linked returns the backend of that name, or a zero one where none is linked in.
func linked(name string) backend.Factory {
	if i := slices.IndexFunc(factories, func(f backend.Factory) bool { return f.Name == name }); i >= 0 {
		return factories[i]
	}
	return backend.Factory{}
}

func factoryNames() []string {
	var names []string
	for _, f := range factories {
		names = append(names, f.Name)
	}
	return names
}

func schemas() map[string][]backend.Option {
	m := make(map[string][]backend.Option)
	for _, f := range factories {
		m[f.Name] = f.Options
	}
	return m
}

// pluginSpec says where the plugin of a backend is, and how it is started. A plugin that the configuration names without
// a slash is one in PATH.
func pluginSpec(p config.Plugins, b config.Backend) (host.ProcessSpec, error) {
	spec := host.ProcessSpec{Name: b.Name, Path: b.Plugin, SHA256: b.SHA256, Env: b.Env, Look: p.Look}
	if spec.Path != "" {
		return spec, nil
	}
	dir := p.Dir
	if dir == "" {
		program, err := os.Executable()
		if err != nil {
			return spec, fmt.Errorf("find the plugins, which are beside umbp: %w; set plugins.dir", err)
		}
		dir = filepath.Dir(program)
	}
	// A path without a slash would be looked for in PATH.
	var err error
	spec.Path, err = filepath.Abs(filepath.Join(dir, "umbp-plugin-"+b.Name))
	return spec, err
}

// describePlugin asks a plugin for the options of its backend. It is the Describe of a config.Source.
func describePlugin(p config.Plugins, b config.Backend) ([]backend.Option, error) {
	spec, err := pluginSpec(p, b)
	if err != nil {
		return nil, err
	}
	d, err := host.Describe(context.Background(), spec)
	if err != nil {
		return nil, err
	}
	return d.Schema(), nil
}

// backendSpec says how a backend is opened. The factory is its own where it is linked in, and otherwise a zero one.
func backendSpec(factory backend.Factory, mode string, p config.Plugins, b config.Backend) (host.Spec, error) {
	if mode != config.AsProcess {
		return host.Spec{Factory: factory, Options: b.Options}, nil
	}
	process, err := pluginSpec(p, b)
	return host.Spec{Process: &process, Options: b.Options}, err
}
