# The few commands a person types. CMake does the work; its presets are in CMakePresets.json.

FUZZ_SECONDS ?= 20
WERROR ?= OFF
# Those of cmake/cuda.cmake if empty; may also come from the environment.
CUDA_ARCHITECTURES ?=

.PHONY: help setup build demo test test-cuda test-cuda-sanitize test-cuda-emulated bench dist format checked fuzz clean

help:
	@echo "make build    install what is missing and build the program, build/mamba3"
	@echo "              (CUDA_ARCHITECTURES=native: for this machine's GPU only)"
	@echo "make demo     train a small model for a minute and write text with it (TEXT=FILE: on this text)"
	@echo "make test     build and run every test"
	@echo "make test-cuda  run the tests of the ops and of whole models on the GPU"
	@echo "make test-cuda-sanitize  small ones of them under compute-sanitizer (TOOLS='...': of its tools)"
	@echo "make test-cuda-emulated  the same small ones without a GPU, on one that is emulated"
	@echo "make bench    time the ops (ARGS='...': flags of mamba3 bench)"
	@echo "make dist     a folder in dist/ that runs without the packages (DIST_CUBLAS=1: with cuBLASLt)"
	@echo "make format   format the sources"
	@echo "make fuzz     run each fuzzer for FUZZ_SECONDS ($(FUZZ_SECONDS))"
	@echo "make clean    remove what was built"

setup:
	@scripts/setup build

build: setup
	@cmake --preset release -DMAMBA3_WERROR=$(WERROR) \
	  "-DMAMBA3_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES)" >/dev/null
	@cmake --build --preset release

demo: build
	@if [ -z "$(TEXT)" ]; then scripts/setup demo; fi
	@TEXT="$(TEXT)" scripts/demo

test: build
	@scripts/test build

test-cuda: build
	@scripts/test_cuda

test-cuda-sanitize: build
	@scripts/test_cuda sanitize $(TOOLS)

# What the sanitizers look at: tests, fuzzers, the emulated GPU.
checked: setup
	@scripts/setup ci
	@cmake --preset checked >/dev/null
	@cmake --build --preset checked

test-cuda-emulated: checked
	@scripts/test_cuda emulated

bench: build
	@build/mamba3 bench $(ARGS)

dist: build
	@DIST_CUBLAS="$(DIST_CUBLAS)" scripts/dist

format:
	@scripts/setup ci
	@scripts/format

fuzz: checked
	@scripts/fuzz $(FUZZ_SECONDS)

clean:
	@rm -rf build build-checked dist
