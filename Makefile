# The few commands a person types. CMake does the work; its presets are in CMakePresets.json.

FUZZ_SECONDS ?= 20
WERROR ?= OFF

.PHONY: help setup build demo test bench format fuzz clean

help:
	@echo "make build    install what is missing and build the program, build/mamba3"
	@echo "make demo     train a small model for a minute and write text with it (TEXT=FILE: on this text)"
	@echo "make test     build and run every test"
	@echo "make bench    time the ops (ARGS='...': flags of mamba3 bench)"
	@echo "make format   format the sources"
	@echo "make fuzz     run each fuzzer for FUZZ_SECONDS ($(FUZZ_SECONDS))"
	@echo "make clean    remove what was built"

setup:
	@scripts/setup build

build: setup
	@cmake --preset release -DMAMBA3_WERROR=$(WERROR) >/dev/null
	@cmake --build --preset release

demo: build
	@if [ -z "$(TEXT)" ]; then scripts/setup demo; fi
	@TEXT="$(TEXT)" scripts/demo

test: build
	@scripts/test build

bench: build
	@build/mamba3 bench $(ARGS)

format:
	@scripts/setup ci
	@scripts/format

fuzz: setup
	@scripts/setup ci
	@cmake --preset fuzz >/dev/null
	@cmake --build --preset fuzz
	@scripts/fuzz $(FUZZ_SECONDS)

clean:
	@rm -rf build build-asan build-clang build-fuzz
