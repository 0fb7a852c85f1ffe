package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/knadh/koanf/parsers/toml/v2"
	"go.yaml.in/yaml/v3"
)

// The formats of files, by extension. The readers of YAML and JSON are our own, because the usual ones drop what
// a strict reader must see: further documents, keys given twice, and how a number was written (an option 1.10 is
// not 1.1). All yield strings, bools, nil, []any and map[string]any; numbers are json.Number, or int64 and float64
// from TOML.
var formats = map[string]struct {
	name  string
	parse func([]byte) (map[string]any, error)
}{
	".yaml": {"YAML", parseYAML},
	".yml":  {"YAML", parseYAML},
	".json": {"JSON", parseJSON},
	".toml": {"TOML", toml.Parser().Unmarshal},
}

// maxFileSize bounds a configuration file, so that a wrong path cannot fill the memory.
const maxFileSize = 256 << 10

// readFile reads a configuration file.
func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil {
		return nil, err
	} else if !info.Mode().IsRegular() {
		return nil, errors.New("it is not a regular file")
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFileSize+1))
	if err == nil && len(data) > maxFileSize {
		err = fmt.Errorf("it is larger than %d KiB", maxFileSize>>10)
	}
	return data, err
}

// parseFile parses data in the format that the extension of path names.
func parseFile(path string, data []byte) (map[string]any, error) {
	format, ok := formats[filepath.Ext(path)]
	if !ok {
		return nil, fmt.Errorf("extension %q is none of %v", filepath.Ext(path), slices.Sorted(maps.Keys(formats)))
	}
	m, err := format.parse(bytes.TrimPrefix(data, []byte("\uFEFF")))
	if err != nil {
		return nil, fmt.Errorf("it cannot be read as %s: %w", format.name, err)
	}
	return m, nil
}

// top makes sure that a file holds keys and not a list or a lone value. A file without anything holds no keys.
func top(v any) (map[string]any, error) {
	m, ok := v.(map[string]any)
	if !ok && v != nil {
		return nil, fmt.Errorf("it holds %s and not keys with values", describe(v))
	}
	return m, nil
}

func parseYAML(data []byte) (map[string]any, error) {
	decoder := yaml.NewDecoder(bytes.NewReader(data))
	var document, next yaml.Node
	switch err := decoder.Decode(&document); {
	case errors.Is(err, io.EOF):
		return nil, nil
	case err != nil:
		return nil, err
	}
	if err := decoder.Decode(&next); err == nil {
		return nil, fmt.Errorf("line %d: a second document begins, and only one is read", next.Line)
	} else if !errors.Is(err, io.EOF) {
		return nil, err
	}
	v, err := yamlValue(document.Content[0])
	if err != nil {
		return nil, err
	}
	return top(v)
}

func yamlValue(n *yaml.Node) (any, error) {
	switch n.Kind {
	case yaml.MappingNode:
		m := make(map[string]any, len(n.Content)/2)
		for i := 0; i < len(n.Content); i += 2 {
			k := n.Content[i]
			if k.Kind != yaml.ScalarNode || k.ShortTag() == "!!merge" {
				return nil, fmt.Errorf("line %d: a key is one word; merging and other keys are not read", k.Line)
			}
			if _, twice := m[k.Value]; twice {
				return nil, fmt.Errorf("line %d: key %q is given twice", k.Line, k.Value)
			}
			v, err := yamlValue(n.Content[i+1])
			if err != nil {
				return nil, err
			}
			m[k.Value] = v
		}
		return m, nil
	case yaml.SequenceNode:
		list := make([]any, len(n.Content))
		for i, c := range n.Content {
			v, err := yamlValue(c)
			if err != nil {
				return nil, err
			}
			list[i] = v
		}
		return list, nil
	case yaml.ScalarNode:
		switch tag := n.ShortTag(); tag {
		case "!!str", "!!timestamp":
			return n.Value, nil
		case "!!null":
			return nil, nil
		case "!!int", "!!float":
			return json.Number(n.Value), nil
		case "!!bool":
			var b bool
			err := n.Decode(&b)
			return b, err
		default:
			return nil, fmt.Errorf("line %d: values tagged %s are not read", n.Line, tag)
		}
	}
	return nil, fmt.Errorf("line %d: references are not read: write the value out", n.Line)
}

func parseJSON(data []byte) (map[string]any, error) {
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.UseNumber()
	v, err := jsonValue(decoder)
	if err != nil {
		if errors.Is(err, io.EOF) && len(bytes.TrimSpace(data)) == 0 {
			return nil, nil
		}
		return nil, err
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("something follows its end, at byte %d", decoder.InputOffset())
	}
	return top(v)
}

func jsonValue(d *json.Decoder) (any, error) {
	token, err := d.Token()
	if err != nil {
		return nil, err
	}
	switch token {
	case json.Delim('{'):
		m := make(map[string]any)
		for d.More() {
			name, err := d.Token()
			if err != nil {
				return nil, err
			}
			k := name.(string) // the decoder accepts nothing else here
			if _, twice := m[k]; twice {
				return nil, fmt.Errorf("key %q is given twice, at byte %d", k, d.InputOffset())
			}
			if m[k], err = jsonValue(d); err != nil {
				return nil, err
			}
		}
		_, err := d.Token()
		return m, err
	case json.Delim('['):
		list := []any{}
		for d.More() {
			v, err := jsonValue(d)
			if err != nil {
				return nil, err
			}
			list = append(list, v)
		}
		_, err := d.Token()
		return list, err
	}
	return token, nil
}
