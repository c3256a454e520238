# The commands of this project. `make` alone lists them.
#   ARGS=...   passed on:  make site ARGS='--check --diff'   make unit ARGS='-k release'
#   ROLE=...   the Molecule scenarios of one role:  make molecule ROLE=baseline
#   VLLM=cpu   the lab with the real vLLM, built for CPUs:  make lab VLLM=cpu   make site VLLM=cpu
#   PYTHON=... a Python 3.12-3.14 of your choice for .venv
SHELL := /bin/sh
.DEFAULT_GOAL := help
.SUFFIXES:
MAKEFLAGS += --no-builtin-rules --no-print-directory
# Stages share one lab and two cores: an outer -j must not start them together.
.NOTPARALLEL:

ARGS :=
ROLE :=
VLLM :=
PY := .venv/bin/python
IN_LAB := scripts/lab-env

.PHONY: lab test setup site lint unit molecule outcomes bench faults lab-down clean help docs lock pins

lab: ## All set-up, the lab, and site.yml on it; ends with a table of what runs
	@VLLM='$(VLLM)' scripts/lab $(ARGS)

test: setup ## Everything: lint, unit, lab, outcomes, Molecule, a sample of faults; ends with "N passed, N failed"
	@$(PY) scripts/test $(ARGS)

setup: ## The virtual environment .venv, from the lock; made again only when the lock or the Python changed
	@scripts/setup

site: setup ## site.yml on the running lab (ARGS= goes to ansible-playbook)
	@$(PY) -m lab check && $(IN_LAB) ansible-playbook -i inventories/lab site.yml $(if $(filter cpu,$(VLLM)),-e @lab/vllm/cpu.yml) $(ARGS)

lint: setup ## ruff, mypy, yamllint, ansible-lint
	@$(PY) scripts/lint $(ARGS)

unit: setup ## pytest for the plugins, the lab and the project's own rules
	@$(IN_LAB) pytest tests/unit $(ARGS)

molecule: setup ## Molecule, all scenarios or those of ROLE=
	@$(IN_LAB) scripts/molecule $(strip $(ROLE) $(if $(ARGS),-- $(ARGS)))

outcomes: setup ## What the running lab must show, from outside, from the Bastion and inside
	@$(IN_LAB) pytest tests/outcomes $(ARGS)

bench: setup ## Speed, cost and scale, as tables
	@$(IN_LAB) python -m tests.bench $(ARGS)

faults: setup ## What is broken on purpose, the whole suite (some hours; ARGS='-m sample' for a few minutes)
	@$(IN_LAB) pytest tests/faults $(ARGS)

lab-down: ## Remove the lab and everything that it made
	@scripts/lab --down

clean: lab-down ## lab-down, then .venv and caches; nothing of yours
	rm -rf .venv .lab .ansible .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .molecule build
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

docs: setup ## The input tables in the roles' READMEs, from their argument specs
	@$(PY) scripts/role-docs $(ARGS)

lock: setup ## Compile requirements/*.in into locks with hashes (ARGS=--upgrade for the newest)
	@scripts/lock $(ARGS)

pins: setup ## Newer releases of what the Bastion downloads, with their digests (ARGS=--check writes nothing)
	@$(PY) scripts/pins $(ARGS)

help: ## This list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | awk -F'|' '{ printf "  make %-10s %s\n", $$1, $$2 }'
