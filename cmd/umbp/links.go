package main

import (
	"fmt"
	"io"
	"slices"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// linkRow is a pair of places between which a backend moves bytes: GPUs, by their PCI addresses, or "host".
type linkRow struct {
	Near string `json:"near"`
	Far  string `json:"far"`
	Cost int    `json:"cost"`
	Text string `json:"text,omitempty"`
}

func linkRows(links []backend.Link) []linkRow {
	name := func(place string) string {
		if place == "" {
			return "host"
		}
		return place
	}
	var rows []linkRow
	for _, l := range links {
		rows = append(rows, linkRow{name(l.Near), name(l.Far), l.Cost, oneLine(l.Text)})
	}
	return rows
}

// printLinks prints the links of a backend as a matrix: near places down, far ones across, and a dash where there is no
// link.
func printLinks(w io.Writer, links []linkRow) error {
	var places []string
	for _, l := range links {
		for _, place := range []string{l.Near, l.Far} {
			if !slices.Contains(places, place) {
				places = append(places, place)
			}
		}
	}
	slices.SortFunc(places, func(a, b string) int {
		switch {
		case a == b:
			return 0
		case a == "host" || b != "host" && a < b: // the host first
			return -1
		}
		return 1
	})
	rows := make([][]string, len(places))
	for i, near := range places {
		rows[i] = []string{near}
		for _, far := range places {
			cell := "-"
			if k := slices.IndexFunc(links, func(l linkRow) bool { return l.Near == near && l.Far == far }); k >= 0 {
				if cell = links[k].Text; cell == "" {
					cell = fmt.Sprintf("cost %d", links[k].Cost)
				}
			}
			rows[i] = append(rows[i], cell)
		}
	}
	return printTable(w, append([]string{"FROM \\ TO"}, places...), rows)
}
