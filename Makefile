# "make" lists what there is to make.

GO      ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
FUZZTIME ?= 20s
PLUGINS = ./plugins/shm/umbp-plugin-shm ./plugins/tcp/umbp-plugin-tcp ./plugins/xgmi/umbp-plugin-xgmi ./plugin-sdk/null/umbp-plugin-null
STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.8.2
HAVE_VERBS = echo '\#include <infiniband/verbs.h>' | $$($(GO) env CC) -E - >/dev/null 2>&1
BUILD_RDMA = (set -x; CGO_ENABLED=1 $(GO) build -trimpath -ldflags "-X main.version=$(VERSION)" -o bin/ ./plugins/rdma/umbp-plugin-rdma)

.DEFAULT_GOAL := help
.PHONY: help build rdma demo test test-rdma test-gpu lint bench bench-rdma bench-gpu fuzz generate clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## build bin/umbp, and the plugins beside it; without cgo, but for the one for RDMA
	@mkdir -p bin
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags "-X main.version=$(VERSION)" -o bin/ ./cmd/umbp $(PLUGINS)
	@if $(HAVE_VERBS); then $(BUILD_RDMA); else echo "left out umbp-plugin-rdma, which needs gcc and infiniband/verbs.h: \"make rdma\" installs them and builds it"; fi

rdma: ## install what the plugin for RDMA needs, and build it
	@scripts/need gcc infiniband/verbs.h rdma-run
	@mkdir -p bin
	@$(BUILD_RDMA)

demo: build ## start a directory and two nodes, move a real file through them, compare it, and show the figures
	@scripts/demo

test: ## run all tests under the race detector, each benchmark once, and RDMA in a virtual machine
	@scripts/need gcc infiniband/verbs.h
	-@scripts/need protoc python3-grpcio # without them the tests of the plugin in Python are skipped
	-@scripts/need libamdhip64 # without it the test of a real runtime for GPUs is skipped
	@mkdir -p .cache
	$(GO) vet ./...
	@# The tests of devices need some here only where a person asks for them: test-rdma has its own.
	UMBP_TEST_REQUIRE= $(GO) test -race -timeout 15m $$($(GO) list ./... | grep -v '/test/lab$$')
	CGO_ENABLED=0 UMBP_TEST_REQUIRE= $(GO) test -timeout 5m ./plugin-sdk/gpu # calls C its own way then
	$(GO) test -run '^$$' -bench . -benchtime 1x -timeout 10m ./... > .cache/bench-once.log 2>&1 || { cat .cache/bench-once.log; exit 1; }
	@$(MAKE) --no-print-directory test-rdma

test-rdma: ## run the tests of RDMA over soft-RoCE, in virtual machines, as far as they are not up to date
	@scripts/need gcc infiniband/verbs.h
	-@scripts/lab --prepare # without it the tests are skipped, or fail where UMBP_TEST_REQUIRE has rdma
	$(GO) test -v -timeout 60m ./test/lab
	@echo "results: $$(ls .cache/lab/results/*.json 2>/dev/null | tr '\n' ' ')"

test-gpu: ## run the tests on a real GPU, where there is one
	@scripts/need gcc
	$(GO) test -v -count 1 -timeout 20m -run '^TestGPU' -skip Simulated ./plugin-sdk/gpu ./plugins/xgmi

lint: ## check format, vet, staticcheck, and that generated code and go.mod are current
	@scripts/need gcc infiniband/verbs.h
	@files=$$(gofmt -l .); [ -z "$$files" ] || { echo "not as gofmt would have it: $$files"; exit 1; }
	$(GO) vet ./...
	$(GO) vet -tags noxgmi ./cmd/umbp
	$(GO) run $(STATICCHECK) ./...
	$(GO) mod tidy -diff
	@scripts/generate --check

bench: build ## run the benchmarks, each beside the limit it is held against
	@scripts/need iperf3 redis-server redis-benchmark
	@scripts/bench

bench-rdma: ## measure perftest and umbp beside each other over soft-RoCE, in one virtual machine
	@scripts/bench-rdma

bench-gpu: build ## measure a GPU's own copies and umbp beside each other, where there is a GPU
	@scripts/bench-gpu

fuzz: ## fuzz every target for FUZZTIME (20s each)
	@scripts/fuzz $(FUZZTIME)

generate: ## generate the code of the protocols, and the page of the backends' options
	@scripts/generate
	CGO_ENABLED=0 $(GO) run -tags rdma ./cmd/umbp backends schema shm tcp xgmi rdma --markdown > docs/options.md

clean: ## remove what was built
	rm -rf bin .cache
