package host

import (
	"github.com/hashicorp/go-hclog"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// pluginLog is what go-plugin logs to. Go-plugin hands it the lines of the plugin's log by a logger that it names after
// the plugin's file: they go to the host's log, each at its level and with its fields. What go-plugin has to say itself
// is for those who look for a defect: the host reports starts and ends in its own words.
type pluginLog struct {
	hclog.Logger // discards; it has the methods that go-plugin does not call
	to           backend.Logger
	backend      string
	file         string // of the plugin, without its folder
	lines        bool   // this is the logger of the plugin's lines
}

func newPluginLog(to backend.Logger, name, file string) *pluginLog {
	return &pluginLog{Logger: hclog.NewNullLogger(), to: to, backend: name, file: file}
}

// Named implements hclog.Logger.
func (l *pluginLog) Named(name string) hclog.Logger {
	named := *l
	named.lines = name == l.file
	return &named
}

// GetLevel implements hclog.Logger. The host's log leaves out what it does not want.
func (l *pluginLog) GetLevel() hclog.Level { return hclog.Debug }

// Trace implements hclog.Logger.
func (l *pluginLog) Trace(string, ...any) {}

// Debug implements hclog.Logger.
func (l *pluginLog) Debug(msg string, args ...any) { l.log(l.to.Debug, msg, args) }

// Info implements hclog.Logger.
func (l *pluginLog) Info(msg string, args ...any) { l.log(l.to.Info, msg, args) }

// Warn implements hclog.Logger.
func (l *pluginLog) Warn(msg string, args ...any) { l.log(l.to.Warn, msg, args) }

// Error implements hclog.Logger.
func (l *pluginLog) Error(msg string, args ...any) { l.log(l.to.Error, msg, args) }

func (l *pluginLog) log(at func(string, ...any), msg string, args []any) {
	if !l.lines {
		at, msg = l.to.Debug, "go-plugin: "+msg
	} else if n := len(args); n >= 2 && args[n-2] == "timestamp" { // the host's log has its own
		args = args[:n-2]
	}
	at(msg, append(args[:len(args):len(args)], "plugin", l.backend)...)
}

// levelOf returns what the plugin's own log should leave out: what the host's would, where that is known.
func levelOf(log backend.Logger) string {
	if leveled, ok := log.(interface{ GetLevel() hclog.Level }); ok {
		return leveled.GetLevel().String()
	}
	return hclog.Debug.String()
}
