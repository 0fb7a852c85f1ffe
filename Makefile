# "make" lists what there is to make.

GO      ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
FUZZTIME ?= 20s
PLUGINS = ./plugins/shm/umbp-plugin-shm ./plugins/tcp/umbp-plugin-tcp ./plugin-sdk/null/umbp-plugin-null
STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.8.2

.DEFAULT_GOAL := help
.PHONY: help build demo test lint bench fuzz generate clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## build bin/umbp, and the plugins beside it, without cgo
	@mkdir -p bin
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags "-X main.version=$(VERSION)" -o bin/ ./cmd/umbp $(PLUGINS)

demo: build ## start a directory and two nodes, move a real file through them, compare it, and show the figures
	@scripts/demo

test: ## run all tests under the race detector, and each benchmark once
	@scripts/need gcc
	-@scripts/need protoc python3-grpcio # without them the tests of the plugin in Python are skipped
	@mkdir -p .cache
	$(GO) vet ./...
	$(GO) test -race -timeout 15m ./...
	$(GO) test -run '^$$' -bench . -benchtime 1x -timeout 10m ./... > .cache/bench-once.log 2>&1 || { cat .cache/bench-once.log; exit 1; }

lint: ## check format, vet, staticcheck, and that generated code and go.mod are current
	@files=$$(gofmt -l .); [ -z "$$files" ] || { echo "not as gofmt would have it: $$files"; exit 1; }
	$(GO) vet ./...
	$(GO) run $(STATICCHECK) ./...
	$(GO) mod tidy -diff
	@scripts/generate --check

bench: build ## run the benchmarks, each beside the limit it is held against
	@scripts/need iperf3 redis-server redis-benchmark
	@scripts/bench

fuzz: ## fuzz every target for FUZZTIME (20s each)
	@scripts/fuzz $(FUZZTIME)

generate: ## generate the code of the protocols, and the page of the backends' options
	@scripts/generate
	$(GO) run ./cmd/umbp backends schema shm tcp --markdown > docs/options.md

clean: ## remove what was built
	rm -rf bin .cache
