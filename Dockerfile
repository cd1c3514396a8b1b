# dinogen with the exact versions of constraints.txt: what `make install` installs.
#
#   docker build -t dinogen .                                 PyTorch for CUDA, about 8 GB
#   docker build -t dinogen --build-arg TORCH_INDEX=URL .     another build of it, such as the CPU's: the
#                                                             index that the selector of pytorch.org names
#   docker run --rm dinogen make -C /opt/dinogen demo ARGS="--out /tmp/demo"
#   docker run --rm dinogen make -C /opt/dinogen test
#   docker run --rm --gpus all --ipc=host -v "$PWD:/work" dinogen dinogen train my.yaml
FROM python:3.11-slim-bookworm

# g++ is for engine.compile, make and git for the commands of the Makefile and their tests. Their
# versions are those of the base image's release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 dinogen \
    && install --directory --owner=dinogen --group=dinogen \
    /home/dinogen/.cache /home/dinogen/.cache/pip /opt/dinogen /work \
    && git config --system --add safe.directory /opt/dinogen

# dinogen, in numbers that other systems know too
USER 1000:1000
WORKDIR /opt/dinogen

# What decides which packages are installed, so that other changes do not install them again. An
# editable installation needs the names of the packages, and no more.
COPY --chown=1000:1000 Makefile setup.cfg pyproject.toml constraints.txt README.md LICENSE ./
COPY --chown=1000:1000 dinogen/version.py dinogen/
ARG TORCH_INDEX=
RUN --mount=type=cache,target=/home/dinogen/.cache/pip,uid=1000,gid=1000 \
    mkdir launch shards \
    && touch dinogen/__init__.py launch/__init__.py shards/__init__.py \
    && PIP_EXTRA_INDEX_URL="$TORCH_INDEX" make install

COPY --chown=1000:1000 . .
# The tests ask git for the files of dinogen; make compares the times of the files above.
RUN touch .venv/.installed && git init --quiet && git add --all

ENV PATH=/opt/dinogen/.venv/bin:$PATH \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /work
CMD ["dinogen", "--help"]
