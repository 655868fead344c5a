# syntax=docker/dockerfile:1
# The program for CPUs.
#
#   docker build --build-arg XRAY_COMMIT=$(git rev-parse --short=9 HEAD) -t xray-qwen3vl .
#   docker run --rm xray-qwen3vl infer
#   docker run --rm -p 7860:7860 -e XRAY_API_KEY=choose-a-secret -v /srv/models:/models:ro xray-qwen3vl \
#     serve --model /models/Qwen3-VL-8B-Instruct
#
# The tiny model, the configs and the sample data set are inside the program. It loads no library but the C library.
# Larger models are mounted at /models; runs, reports and the cache go to /runs.

ARG RUST=1.95
ARG DEBIAN=bookworm

FROM rust:${RUST}-slim-${DEBIAN} AS build
WORKDIR /src
COPY . .
# There is no git here: the commit is given from outside.
ARG XRAY_COMMIT=
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo install --path . --locked --root /out

FROM debian:${DEBIAN}-slim
COPY --from=build /out/bin/xray-qwen3vl /usr/local/bin/xray-qwen3vl
COPY LICENSE /usr/share/doc/xray-qwen3vl/LICENSE
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /runs xray \
    && install --directory --owner=xray --group=xray /runs /models
USER 10001:10001
WORKDIR /runs
VOLUME ["/models", "/runs"]
# Inside the container the server listens on all addresses; it wants XRAY_API_KEY, or --no-auth.
ENV HOME=/runs XRAY_HOST=0.0.0.0 XRAY_PORT=7860
EXPOSE 7860
# Ready once the model is loaded. For containers that serve; others end before it matters.
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --retries=3 \
    CMD ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/$XRAY_PORT && printf 'GET /readyz HTTP/1.0\\r\\n\\r\\n' >&3 && head -n 1 <&3 | grep -q ' 200 '"]
# SIGTERM lets running requests finish.
STOPSIGNAL SIGTERM
ENTRYPOINT ["xray-qwen3vl"]
CMD ["serve"]
