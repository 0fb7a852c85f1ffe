package config

import (
	"fmt"
	"strings"
)

// DefaultYAML returns a configuration file that sets every key to its default, with the help of each as a comment.
func DefaultYAML() string {
	var b strings.Builder
	b.WriteString(`# Configuration of UMBP. Every value below is the default, and every line may be left out.
#
# Sizes have units (64KiB, 1GB), and so have durations (1.5s). A value marked "live" is taken over by a running
# process when this file changes; any other needs a restart.
#
# The environment overrides this file: UMBP_POOL__PAGE_SIZE=128KiB sets pool.page_size. A flag overrides both.
`)
	writeKeys(&b, root, "")
	return b.String()
}

func writeKeys(b *strings.Builder, keys []*key, indent string) {
	for _, k := range keys {
		if indent == "" {
			b.WriteString("\n")
		}
		writeComment(b, indent, k.doc())
		switch {
		case k.section():
			fmt.Fprintf(b, "%s%s:\n", indent, k.name)
			writeKeys(b, k.children, indent+"  ")
		case k.listOfStructs():
			for _, child := range leavesOf(k.children) {
				writeComment(b, indent, "  "+child.path+": "+child.doc())
			}
			fmt.Fprintf(b, "%s%s:\n", indent, k.name)
			for line := range strings.Lines(k.def) {
				fmt.Fprintf(b, "%s  %s\n", indent, strings.TrimSuffix(line, "\n"))
			}
		case k.def == "":
			fmt.Fprintf(b, "%s%s: \"\"\n", indent, k.name)
		default:
			fmt.Fprintf(b, "%s%s: %s\n", indent, k.name, k.def)
		}
	}
}

// doc is the help of a key together with what its tags say.
func (k *key) doc() string {
	doc := k.help
	switch {
	case len(k.choices) > 0:
		doc += " One of " + strings.Join(k.choices, ", ") + "."
	case k.scalar() && k.min != "" && k.min != k.max:
		doc += " At least " + k.min
		if k.max != "" {
			doc += ", at most " + k.max
		}
		doc += "."
	}
	if k.live {
		doc += " Live."
	}
	return doc
}

// writeComment writes text as lines of a comment. Lines after the first keep the indent that text begins with.
func writeComment(b *strings.Builder, indent, text string) {
	const width = 100
	words := strings.Fields(text)
	indent += "# " + text[:len(text)-len(strings.TrimLeft(text, " "))]
	line := indent + words[0]
	for _, word := range words[1:] {
		if len(line)+1+len(word) > width {
			b.WriteString(line + "\n")
			line = indent + word
			continue
		}
		line += " " + word
	}
	b.WriteString(line + "\n")
}
