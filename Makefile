# Envoy KV Router. `make` lists the targets.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

TOOLS := $(CURDIR)/.tools/bin
export PATH := $(TOOLS):$(PATH):$(HOME)/.cargo/bin
# Naming the toolchain keeps rustup from looking for a newer one because a target is missing.
export RUSTUP_TOOLCHAIN ?= $(shell sed -n 's/^channel = "\(.*\)"/\1/p' rust-toolchain.toml)
# What the end-to-end tests, the benches and the demo start.
export ENVOY := $(TOOLS)/envoy
export NATS_SERVER := $(TOOLS)/nats-server
export KV_FILTER_WASM := $(CURDIR)/target/wasm32-unknown-unknown/wasm/kv_filter.wasm
export KV_FILTER_CHAOS_WASM := $(CURDIR)/target/chaos/wasm32-unknown-unknown/wasm/kv_filter.wasm
export KV_FILTER_OLDER_WASM := $(CURDIR)/target/older/wasm32-unknown-unknown/wasm/kv_filter.wasm

CLIPPY := -D warnings

.PHONY: help
help: ## list the targets
	@echo 'Envoy KV Router: routing of LLM requests by KV cache, inside Envoy'
	@echo
	@sed -n 's/^\([a-zA-Z%-]*\):[^#]*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | sed 's/%/NAME/' | \
		awk -F '|' '{ printf "%-20s %s\n", $$1, $$2 }'

.PHONY: envoy-up
envoy-up: preflight ## build all, start a fleet on this machine, compare three policies
	@python3 -B envoy/demo/main.py up

.PHONY: envoy-down
envoy-down: ## stop what envoy-up started and leave nothing behind
	@python3 -B envoy/demo/main.py down

.PHONY: build
build: preflight filter ## the two programs (target/release) and the filter
	@echo '==> building kv-router and kv-sim (two to four minutes the first time)'
	@cargo build --release -p kv-router -p kv-sim

.PHONY: filter
filter: preflight ## the filter that Envoy loads (target/wasm32-unknown-unknown/wasm)
	@echo '==> building the filter for wasm32 (half a minute the first time)'
	@envoy/tools/wasm-cargo build -p kv-filter --profile wasm

.PHONY: filter-chaos
filter-chaos: preflight
	@echo '==> building the filter that traps on request, for tests (half a minute the first time)'
	@envoy/tools/wasm-cargo build -p kv-filter --features chaos --profile wasm --target-dir target/chaos

# The last release of the filter that speaks the protocol before this one.
OLDER := 835861e223a69bf33d86d88bb28c8094b5c7a562
.PHONY: filter-older
filter-older: preflight
	@echo '==> building an older filter, for tests of releases that differ (a minute the first time)'
	@if git cat-file -e $(OLDER) 2>/dev/null; then \
		mkdir -p target/older/src && \
		{ test -f target/older/src/$(OLDER) || \
			{ git archive $(OLDER) | tar -x -C target/older/src && touch target/older/src/$(OLDER); }; } && \
		envoy/tools/wasm-cargo build --manifest-path target/older/src/Cargo.toml -p kv-filter --profile wasm --target-dir target/older; \
	else \
		echo 'commit $(OLDER) is missing from this clone: its filter is not tested'; \
	fi

.PHONY: tools
tools: preflight ## fetch Envoy, NATS and Node into .tools
	@python3 -B envoy/tools/fetch.py

.PHONY: check
check: components ## format, lints and unit tests, seconds when warm
	@echo '==> format'
	@cargo fmt --all --check
	@echo '==> lints (a few minutes the first time)'
	@cargo clippy --quiet --workspace --all-targets -- $(CLIPPY)
	@envoy/tools/wasm-cargo clippy --quiet -p kv-core -p kv-filter -- $(CLIPPY)
	@echo '==> unit tests'
	@cargo test --quiet --workspace --lib --bins

.PHONY: test
test: tools filter filter-chaos filter-older ## every test: unit, property, wasm32 under Node, end to end with real Envoy and NATS
	@envoy/tools/wasm-test-runner
	@echo '==> building the tests (three to five minutes the first time)'
	@cargo test --quiet --workspace --no-run
	@echo '==> unit, property and end-to-end tests, with real Envoy and NATS (a few minutes)'
	@cargo test --workspace
	@echo '==> core on wasm32 under Node (a minute the first time)'
	@envoy/tools/wasm-cargo test -p kv-core

# A workspace of its own: nothing of the product depends on what it is compared with.
PARITY := --manifest-path tests/parity/Cargo.toml --target-dir target/parity

.PHONY: parity
parity: preflight components ## compare with Dynamo's own router crates, in a workspace of its own
	@cargo fmt --manifest-path tests/parity/Cargo.toml --check
	@echo '==> building the comparison with Dynamo (some minutes the first time, needs a C++ compiler)'
	@cargo clippy --quiet $(PARITY) --locked --all-targets -- $(CLIPPY)
	@cargo test --quiet $(PARITY) --locked --no-run
	@echo '==> comparing (three minutes)'
	@cargo test $(PARITY) --locked

.PHONY: parity-mocker
parity-mocker: preflight tools ## index Dynamo's own simulated engines, over NATS and ZMQ, as Dynamo does
	@echo '==> fetching Dynamo (a gigabyte, some minutes the first time)'
	@python3 -B tests/parity/mocker.py fetch target/parity-mocker/venv
	@echo '==> building the comparison with Dynamo (some minutes the first time, needs a C++ compiler)'
	@cargo test --quiet $(PARITY) --locked --no-run
	@MOCKER_ENV=$(CURDIR)/target/parity-mocker/venv cargo test $(PARITY) --locked --test mocker -- --ignored --test-threads 1

# Seconds for each target.
FUZZ_SECONDS ?= 600
CARGO_FUZZ := 0.13.1
FUZZ_TARGETS = $(basename $(notdir $(wildcard fuzz/fuzz_targets/*.rs)))

.PHONY: fuzz
fuzz: preflight ## every decoder of events, requests and answers against changed messages, 10 minutes each
	@[ "$$(cargo fuzz --version 2>/dev/null)" = "cargo-fuzz $(CARGO_FUZZ)" ] || { \
		echo '==> building cargo-fuzz (a minute or two)'; \
		cargo install --quiet --locked --root .tools --version $(CARGO_FUZZ) cargo-fuzz; }
	@echo '==> seeds: the genuine messages of the tests'
	@cargo run --quiet --manifest-path fuzz/Cargo.toml --bin seeds -- sidecar/tests/fixtures fuzz/corpus
	@for target in $(FUZZ_TARGETS); do \
		echo "==> $$target ($(FUZZ_SECONDS) seconds)"; \
		(cd fuzz && cargo fuzz run --sanitizer none $$target -- -max_total_time=$(FUZZ_SECONDS) \
			-max_len=65536 -timeout=10 -rss_limit_mb=2048 -print_final_stats=1) || exit 1; \
	done

.PHONY: storm
storm: tools filter filter-chaos ## a minute of ten times the load that engines can take
	@KV_STORM_SECONDS=60 cargo test -p kv-tests --test storm --test queue -- an_overload ten_times

.PHONY: churn
churn: tools filter ## a minute of workers that join and leave five times a second, under load
	@KV_CHURN_SECONDS=60 cargo test -p kv-tests --test fleet -- workers_come_and_go --nocapture

.PHONY: test-memory
test-memory: preflight ## 24 million random events into an index of 256 MiB (some minutes)
	@cargo test --quiet --release -p kv-core --test memory -- --ignored --nocapture

PEERS := cargo run --quiet --release $(PARITY) --locked --bin

.PHONY: bench-index-peers
bench-index-peers: preflight ## speed and memory of the index beside those of Dynamo's crates
	@$(PEERS) index_memory
	@$(PEERS) index_speed

.PHONY: bench
bench: ## every bench, one after the other: tables here, JSON in target/bench
	@for name in $(patsubst benches/src/bin/%.rs,%,$(wildcard benches/src/bin/*.rs)); do \
		$(MAKE) bench-$$name || exit 1; \
	done

.PHONY: bench-peers
bench-peers: tools filter ## other routers before the same simulated engines (an hour and a half; PEERS_ARGS='--runs 1 --share 0.2' for less)
	@echo '==> building kv-router and kv-sim (two to four minutes the first time)'
	@cargo build --quiet --release -p kv-router -p kv-sim
	@python3 -B benches/peers/main.py $(PEERS_ARGS)

.PHONY: bench-text-peers
bench-text-peers: tools filter ## what a prompt of text costs in other routers, before engines that answer at once (half an hour)
	@echo '==> building kv-router and kv-sim (two to four minutes the first time)'
	@cargo build --quiet --release -p kv-router -p kv-sim
	@cargo build --quiet --release -p kv-benches --bin text_peers
	@mkdir -p target/bench
	@python3 -B benches/peers/text.py

bench-%: tools filter ## one bench by name (a file of benches/src/bin)
	@mkdir -p target/bench
	@echo '==> building kv-router (two to four minutes the first time)'
	@cargo build --quiet --release -p kv-router
	@echo '==> bench $* (some minutes), into target/bench/$*.json'
	@cargo run --quiet --release -p kv-benches --bin $*

TOKENIZER_PARITY := target/tokenizer-parity

.PHONY: tokenizer-parity
tokenizer-parity: preflight ## compare chat templates and tokenizers with Python's transformers (an hour; CONVERSATIONS=100 for less)
	@python3 -B tests/tokenizer-parity/oracle.py fetch $(TOKENIZER_PARITY)
	@echo '==> building the reader of conversations (two to four minutes the first time)'
	@cargo build --quiet --release -p kv-router --example tokenizer_parity
	@$(TOKENIZER_PARITY)/venv/bin/python -B tests/tokenizer-parity/oracle.py check $(TOKENIZER_PARITY) \
		target/release/examples/tokenizer_parity $(or $(CONVERSATIONS),2000)

.PHONY: fmt
fmt: components ## format the Rust sources
	@cargo fmt --all

.PHONY: clean
clean: envoy-down ## remove what was built and fetched
	@rm -rf target .tools

.PHONY: preflight
preflight:
	@envoy/tools/preflight

# rustup's minimal profile leaves these out.
.PHONY: components
components: preflight
	@cargo fmt --version >/dev/null 2>&1 && cargo clippy --version >/dev/null 2>&1 || \
		rustup component add rustfmt clippy
