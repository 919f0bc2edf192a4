# The front door. `make` builds for the GPU that is present, for the CPU alone where there is none.
#   make setup | build | train | test | bench | gpu-check | format | cuda ARCHS="89 90" | release | check-archs | clean
#   make aarch64-check | fuzz: the CPU runtime for ARM under qemu, and the readers of files under libFuzzer

SHELL := /bin/bash
JOBS ?= $(shell nproc)
GENERATOR := $(shell command -v ninja >/dev/null 2>&1 && echo Ninja || echo "Unix Makefiles")
NVCC := $(shell command -v nvcc 2>/dev/null || ls /usr/local/cuda/bin/nvcc 2>/dev/null)
# Compute capability of the GPUs that are present, e.g. 89; empty without a driver.
GPU_ARCHS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d '. ' | sort -u | tr '\n' ' ')
ARCHS ?= 89 90
RELEASE_ARCHS := 80 86 89 90 100 120
space := $(subst ,, )
list = $(subst $(space),;,$(strip $(1)))

ifneq ($(and $(NVCC),$(GPU_ARCHS)),)
HERE_FLAGS := -DFIEDLER_CUDA=ON -DFIEDLER_ARCHS="$(call list,$(GPU_ARCHS))" -DCMAKE_CUDA_COMPILER=$(NVCC)
else
HERE_FLAGS := -DFIEDLER_CUDA=OFF
endif

PACKAGES := build-essential cmake ninja-build pkg-config clang-format python3 python3-scipy libcli11-dev libfmt-dev libgtest-dev \
            nlohmann-json3-dev libeigen3-dev libsentencepiece-dev libxxhash-dev libhwy-dev
# RDKit reads SMILES at `fiedler prepare`; its headers want Boost's. 15 MB to download, 165 MB installed.
OPTIONAL := librdkit-dev libboost-dev

.PHONY: all setup build cuda release check-archs train test bench gpu-check smoke format format-check clean aarch64-check fuzz
all: build

setup:
	@tools/setup $(PACKAGES)
	@tools/setup --optional "SMILES cannot be prepared" $(OPTIONAL)

build: setup
	@cmake -S . -B build -G "$(GENERATOR)" $(HERE_FLAGS) > build.log 2>&1 || { cat build.log; rm -f build.log; exit 1; }; rm -f build.log
	@cmake --build build -j $(JOBS)

cuda: setup
	@[ -n "$(NVCC)" ] || { echo "make cuda needs nvcc (the CUDA toolkit), and there is none on the PATH"; exit 1; }
	@cmake -S . -B build/cuda -G "$(GENERATOR)" -DFIEDLER_CUDA=ON -DFIEDLER_ARCHS="$(call list,$(ARCHS))" -DCMAKE_CUDA_COMPILER=$(NVCC) $(CMAKE_FLAGS)
	@cmake --build build/cuda -j $(JOBS)

release: setup
	@cmake -S . -B build/release -G "$(GENERATOR)" -DFIEDLER_CUDA=ON -DFIEDLER_ARCHS="$(call list,$(RELEASE_ARCHS))" -DCMAKE_CUDA_COMPILER=$(NVCC) $(CMAKE_FLAGS)
	@cmake --build build/release -j $(JOBS)

# Every kernel for every architecture, anew: no spills, no more shared memory than there is.
check-archs: setup
	@[ -n "$(NVCC)" ] || { echo "make check-archs needs nvcc (the CUDA toolkit), and there is none on the PATH"; exit 1; }
	@rm -rf build/archs
	@cmake -S . -B build/archs -G "$(GENERATOR)" -DFIEDLER_CUDA=ON -DFIEDLER_ARCHS="$(call list,$(RELEASE_ARCHS))" \
	    -DFIEDLER_PTXAS_REPORT=ON -DCMAKE_CUDA_COMPILER=$(NVCC) $(CMAKE_FLAGS)
	@cmake --build build/archs -j $(JOBS) > build/archs/build.log 2>&1 || { grep -v "^ptxas info" build/archs/build.log | tail -50; exit 1; }
	@tools/check_ptxas build/archs/build.log $(RELEASE_ARCHS)

# A model from this machine's own C and C++ headers: no download, a few minutes without a GPU. make train TRAIN_FLAGS="--steps 1000"
TRAIN_FLAGS ?=
train: build
	@build/bin/fiedler train --data /usr/include --extensions h,hh,hpp,hxx --max-bytes 32MB $(TRAIN_FLAGS)

test: build
	@ctest --test-dir build --output-on-failure -j $(JOBS)

# make bench K=attention, make bench K="step --preset gpt30m"
bench: build
	@build/bin/fiedler bench $(K)

gpu-check: build
	@tools/gpu_check --bin build/bin

# Small enough for any machine: is the loss below that of a model that only counts tokens?
smoke: build
	@rm -rf build/smoke
	@build/bin/fiedler train --data /usr/include --extensions h --max-bytes 8MB --steps 80 --val-every 40 --device cpu \
	    --log-every 10 --data-cache build/smoke/cache --out build/smoke/run
	@python3 tools/check_run build/smoke/run

FORMATTED := $(shell git ls-files '*.h' '*.c' '*.cpp' '*.cu' '*.cuh' 2>/dev/null)
format:
	@clang-format -i $(FORMATTED)
format-check:
	@clang-format --dry-run -Werror $(FORMATTED)

aarch64-check:
	@tools/aarch64_check
fuzz:
	@tools/fuzz

clean:
	@rm -rf build
