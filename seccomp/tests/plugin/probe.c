/* A plugin that says what it sees: one `key=value` a line on standard output. Its
 * arguments say what to do besides. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

extern char **environ;

static void say(const char *key, long value) { printf("%s=%ld\n", key, value < 0 ? -errno : value); }

static void list(const char *key, const char *path) {
    char *names[64];
    int n = 0;
    DIR *dir = opendir(path);
    if (!dir) {
        say(key, -1);
        return;
    }
    for (struct dirent *e; (e = readdir(dir)) && n < 64;)
        if (e->d_name[0] != '.') names[n++] = strdup(e->d_name);
    closedir(dir);
    for (int i = 0; i < n; i++)
        for (int k = i + 1; k < n; k++)
            if (strcmp(names[i], names[k]) > 0) {
                char *t = names[i];
                names[i] = names[k];
                names[k] = t;
            }
    printf("%s=", key);
    for (int i = 0; i < n; i++) printf("%s%s", i ? " " : "", names[i]);
    printf("\n");
}

static void status(void) {
    char line[256];
    FILE *f = fopen("/proc/self/status", "r");
    while (f && fgets(line, sizeof line, f)) {
        static const char *keys[] = {"Uid:", "Gid:", "Groups:", "CapEff:", "CapBnd:", "NoNewPrivs:", "Seccomp:", "Pid:"};
        for (unsigned i = 0; i < sizeof keys / sizeof *keys; i++)
            if (!strncmp(line, keys[i], strlen(keys[i]))) {
                line[strcspn(line, ":")] = '=';
                for (char *c = line; *c; c++)
                    if (*c == '\t') *c = ' ';
                printf("%s", line);
            }
    }
    if (f) fclose(f);
}

int main(int argc, char **argv) {
    const char *what = argc > 1 ? argv[1] : "";
    if (!strcmp(what, "exit")) return atoi(argv[2]);
    if (!strcmp(what, "call")) {
        /* A call by its number, with numbers for arguments. */
        long a[7] = {0};
        for (int i = 2; i < argc && i < 9; i++) a[i - 2] = strtol(argv[i], NULL, 0);
        errno = 0;
        long result = syscall(a[0], a[1], a[2], a[3], a[4], a[5], a[6]);
        say("result", result);
        return 0;
    }
    if (!strcmp(what, "exec")) {
        /* The call that the stub was allowed once. */
        execve("/proc/self/exe", argv, environ);
        say("exec", -1);
        return 0;
    }
    if (!strcmp(what, "write")) {
        int fd = open(argv[2], O_WRONLY | O_CREAT, 0600);
        say("write", fd < 0 ? fd : write(fd, "x", 1));
        return 0;
    }
    if (!strcmp(what, "connect")) {
        struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(9), .sin_addr.s_addr = htonl(0x7f000001)};
        int fd = socket(AF_INET, SOCK_STREAM, 0);
        say("connect", fd < 0 ? fd : connect(fd, (struct sockaddr *)&to, sizeof to));
        return 0;
    }
    if (!strcmp(what, "sleep")) {
        printf("up\n");
        fflush(stdout);
        for (;;) pause();
    }
    printf("argc=%d\n", argc);
    for (int i = 0; i < argc; i++) printf("argv%d=%s\n", i, argv[i]);
    for (char **e = environ; *e; e++) printf("env %s\n", *e);
    status();
    char link[4096];
    ssize_t len = readlink("/proc/self/exe", link, sizeof link - 1);
    if (len > 0) printf("exe=%.*s\n", (int)len, link);
    list("root", "/");
    list("dev", "/dev");
    list("fds", "/proc/self/fd");
    list("proc", "/proc");
    say("passwd", open("/etc/passwd", O_RDONLY));
    say("cpuinfo", open("/proc/cpuinfo", O_RDONLY));
    say("mem", open("/proc/self/mem", O_RDWR));
    say("create", open("/x", O_WRONLY | O_CREAT, 0600));
    say("mkdir", mkdir("/x", 0700));
    say("selfwrite", len > 0 ? open((link[len] = 0, link), O_WRONLY) : 0);
    say("null", open("/dev/null", O_RDWR) >= 0 ? 1 : -1);
    say("zero", open("/dev/zero", O_RDONLY) >= 0 ? 1 : -1);
    say("inet", syscall(SYS_socket, 2, 1, 0));
    say("fork", fork());
    int fd = memfd_create("m", 0);
    say("memfd", fd >= 0 && !ftruncate(fd, 4096) && mmap(0, 4096, 3, MAP_SHARED, fd, 0) != MAP_FAILED ? 1 : -1);
    fprintf(stderr, "to standard error\n");
    return 7;
}
