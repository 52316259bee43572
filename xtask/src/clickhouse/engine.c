// Serves ClickHouse's own HTTP handlers from libchdb.so: `engine LIBRARY FOLDER PORT`.
//
// The library is `clickhouse local` with listeners. An endless query keeps it alive; it ends when SIGTERM comes or our
// standard input closes, so that no engine outlives the test that started it.

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static int port;
static int life[2];
static pthread_mutex_t ending = PTHREAD_MUTEX_INITIALIZER;

static void end(void) {
    pthread_mutex_lock(&ending);
    if (life[1] >= 0) close(life[1]);
    life[1] = -1;
    pthread_mutex_unlock(&ending);
}

static void *await_signal(void *set) {
    int caught;
    sigwait(set, &caught);
    end();
    return NULL;
}

static void *await_input(void *unused) {
    char byte;
    while (read(STDIN_FILENO, &byte, 1) > 0) {}
    end();
    return unused;
}

static void *announce(void *unused) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    for (;;) {
        int client = socket(AF_INET, SOCK_STREAM, 0);
        int refused = connect(client, (struct sockaddr *)&address, sizeof address);
        close(client);
        if (!refused) break;
        usleep(10000);
    }
    printf("READY http=%d\n", port);
    fflush(stdout);
    return unused;
}

static int free_port(void) {
    struct sockaddr_in address = {.sin_family = AF_INET};
    socklen_t size = sizeof address;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int server = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(server, (struct sockaddr *)&address, size) || getsockname(server, (struct sockaddr *)&address, &size)) {
        perror("no free port");
        exit(1);
    }
    close(server);
    return ntohs(address.sin_port);
}

int main(int argc, char **argv) {
    if (argc != 4) {
        fprintf(stderr, "usage: engine LIBRARY FOLDER PORT (0 for a free one)\n");
        return 2;
    }
    port = atoi(argv[3]) ? atoi(argv[3]) : free_port();
    void *library = dlopen(argv[1], RTLD_NOW);
    void *(*serve)(int, char **) = library ? (void *(*)(int, char **))dlsym(library, "query_stable_v2") : NULL;
    if (!serve || pipe(life)) {
        fprintf(stderr, "cannot load %s: %s\n", argv[1], dlerror());
        return 1;
    }
    // Blocked here, so that it is blocked in every thread that the library starts.
    sigset_t stop;
    sigemptyset(&stop);
    sigaddset(&stop, SIGTERM);
    sigaddset(&stop, SIGINT);
    pthread_sigmask(SIG_BLOCK, &stop, NULL);
    pthread_t thread;
    pthread_create(&thread, NULL, await_signal, &stop);
    pthread_create(&thread, NULL, await_input, NULL);
    pthread_create(&thread, NULL, announce, NULL);
    char *path, *http, *query;
    if (asprintf(&path, "--path=%s", argv[2]) < 0 || asprintf(&http, "--http_port=%d", port) < 0
        || asprintf(&query,
                    "--query=SYSTEM START LISTEN HTTP; SELECT count() FROM file('/proc/self/fd/%d', 'LineAsString') FORMAT Null",
                    life[0]) < 0) {
        return 1;
    }
    char *arguments[] = {"clickhouse", path, http, "--listen_host=127.0.0.1", query, NULL};
    serve(5, arguments);
    return 0;
}
