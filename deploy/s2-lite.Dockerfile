# s2-lite, the open S2 server, from its published source.
FROM rust:1.94-slim-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends build-essential cmake pkg-config protobuf-compiler \
    && rm -rf /var/lib/apt/lists/*
RUN cargo install s2-lite --locked --version 0.43.4 --root /s2

FROM debian:bookworm-slim
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/* && useradd --system --uid 10001 s2 && install -d -o s2 /var/lib/s2
COPY --from=build /s2/bin/server /usr/local/bin/s2-lite
USER s2
VOLUME /var/lib/s2
EXPOSE 8080
ENTRYPOINT ["s2-lite"]
CMD ["--local-root", "/var/lib/s2", "--port", "8080", "--no-cors", "--no-dashboard"]
