# Set-up and checks. `make demo` and `make test` do everything on a fresh Debian machine; run them as root.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
# Compiled once, as an installed hvctl is, also where whoever calls has switched that off.
export PYTHONDONTWRITEBYTECODE :=
BIN := .venv/bin
PACKAGES := qemu-system-x86 qemu-utils libvirt-daemon-system libvirt-clients libvirt-dev pkg-config gcc \
  python3-dev python3-venv dnsmasq-base iproute2 busybox-static mmdebstrap e2fsprogs kmod cpio zstd postgresql

.PHONY: demo test explore soak planted test-debian13 check lint setup packages host bench-allocate bench-reset bench-collect bench-restarts bench-forecast bench-rounds bench-interrupt bench-guard bench-replay picture clean

demo: setup host
	$(BIN)/python bench/demo.py

test: setup host lint
	$(BIN)/hvctl image build micro
	$(BIN)/hvctl image build debian
	$(BIN)/pytest -q -n 3 --durations=40 -m "not host"
	$(BIN)/pytest -q -n 3 --dist loadfile --no-loadscope-reorder --reruns 1 --rerun-show-tracebacks --durations=40 -m host

# Property tests with examples that nobody has tried yet: what it finds is a fault of hvctl or of a test.
explore: setup
	HVCTL_EXPLORE=1 $(BIN)/pytest -q -n 2 -m "not host and not processes"

# Many resets of guests that spoil everything: make soak N=10000
soak: setup host
	$(BIN)/hvctl image build micro
	HVCTL_SOAK=$(or $(N),10000) $(BIN)/pytest -q -s tests/host/test_soak.py -k in_a_row

# Tests of the tests: each bug of tests/planted/bugs.toml must be noticed. HOST=1: those that only real guests notice.
planted: setup
	$(BIN)/python -m tests.planted $(if $(HOST),--host)

# Snapshots and resets on Debian 13's libvirt, QEMU and Python; TESTS: files, pytest's options, or --guests own.
test-debian13: setup
	$(BIN)/hvctl image build micro
	$(BIN)/hvctl image build debian
	exec setpriv --pdeathsig KILL $(BIN)/python -m tests.debian13 --packages '$(PACKAGES)' $(TESTS)

check: setup lint
	$(BIN)/pytest -q -n 2 -m "not host and not postgresql and not processes"

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench-allocate: setup host
	$(BIN)/hvctl image build micro
	$(BIN)/python bench/allocate.py

bench-reset: setup host
	$(BIN)/hvctl image build debian
	$(BIN)/python bench/reset.py $(if $(ROUNDS),--rounds $(ROUNDS))

bench-collect: setup host
	$(BIN)/hvctl image build micro
	$(BIN)/python bench/collect.py

bench-restarts: setup host
	$(BIN)/hvctl image build micro
	$(BIN)/python bench/restarts.py $(if $(ROUNDS),--rounds $(ROUNDS))

# Models against rules on VM traces: DATA is a file or a folder of series, SPLIT as in 60/15/25@66/78.
bench-forecast: setup
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python bench/forecast.py $(if $(DATA),--data $(DATA)) $(if $(SPLIT),--split $(SPLIT))

bench-rounds: setup
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python bench/forecastrounds.py

bench-interrupt: setup
	$(BIN)/python bench/interrupt.py

bench-guard: setup host
	$(BIN)/hvctl image build micro
	$(BIN)/python bench/guard.py $(if $(SECONDS),--seconds $(SECONDS))

# Policies on a recorded trace: DATA is a file or a folder of series.
bench-replay: setup
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python bench/replay.py $(if $(DATA),--data $(DATA))

# Draws docs/terminal.svg from a real run.
picture: setup host
	$(BIN)/hvctl image build micro
	$(BIN)/python bench/picture.py

setup: packages .venv/ready

# dpkg-query fails when one is missing, and only then apt is asked; PostgreSQL's own cluster is not wanted, only its
# programs: the tests start a server of their own.
packages:
	@dpkg-query -W -f='$${db:Status-Status}\n' $(PACKAGES) 2>/dev/null | grep -qv '^installed$$' \
	  || [ "$$(dpkg-query -W -f='$${db:Status-Status}\n' $(PACKAGES) 2>/dev/null | wc -l)" -ne $(words $(PACKAGES)) ] \
	  || exit 0; \
	apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $(PACKAGES)

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,postgresql]'
	touch $@

host: setup
	$(BIN)/hvctl host prepare --yes

clean:
	rm -rf .venv build dist
