# `make help` lists the targets. Everything runs in .venv, which any target makes when it is missing.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export ANSIBLE_CONFIG := $(CURDIR)/ansible.cfg

.PHONY: help venv lab lab-down check sanity test test-all lock

help: ## Show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: ## Make .venv: a CPython that fits, the locked packages, fleetfit itself
	@tools/bootstrap

lab: venv ## Start three lab hosts on this machine and run the main job on them
	@$(BIN)/fleetfit lab up --deploy

lab-down: venv ## Stop the lab and free the disk it used
	@$(BIN)/fleetfit lab down

check: venv ## Lint and unit tests (under 2 minutes)
	@echo "==> ruff"; ruff check . && ruff format --check --quiet .
	@echo "==> mypy"; mypy
	@echo "==> yamllint, ansible-lint"; yamllint --strict . && ansible-lint --offline -q
	@echo "==> unit tests"; pytest tests/unit -q -n 2

sanity: venv ## ansible-test sanity on the built collection
	@tools/sanity

test: check sanity ## What CI runs: check, sanity, the lab with the main job, integration and end-to-end tests
	@tools/test

test-all: check sanity ## Everything: Molecule and slow tests too
	@tools/test --all

lock: venv ## Rewrite requirements/*.txt from requirements/*.in (no index address in them)
	@for name in dev controller; do \
	    uv pip compile --quiet --universal --python-version 3.12 --generate-hashes --no-emit-index-url --no-header \
	        --constraint requirements/dev.txt requirements/$$name.in --output-file requirements/$$name.txt; \
	done
