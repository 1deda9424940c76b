/* A service for a guest: a boot storm, then a steady load, until it is killed.
 *
 * service STORM_SECONDS STORM_PERCENT STORM_MIB STORM_KBS STEADY_PERCENT STEADY_MIB STEADY_KBS DISK
 * PERCENT of one processor, MIB of memory that is written, KBS written to DISK each second.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { PERIOD = 100 };  /* ms */

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void load(double until, int percent, int mib, int kbs, int disk)
{
    size_t size = (size_t)mib << 20, block = (size_t)kbs * 1000 * PERIOD / 1000 / 512 * 512;
    char *memory = mmap(NULL, size ? size : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char *buffer = NULL;
    off_t at = 16 << 20;
    if (memory == MAP_FAILED || posix_memalign((void **)&buffer, 4096, block ? block : 512))
        exit(1);
    for (size_t i = 0; i < size; i += 4096)
        memory[i] = 1;
    memset(buffer, 7, block ? block : 512);
    while (until < 0 || now() < until) {
        double began = now(), busy = began + PERIOD * percent / 100 / 1e3;
        if (block && pwrite(disk, buffer, block, at) != (ssize_t)block)
            exit(1);
        at = at + block > 30 << 20 ? 16 << 20 : at + block;
        while (now() < busy)
            ;
        double left = began + PERIOD / 1e3 - now();
        if (left > 0)
            usleep(left * 1e6);
    }
    munmap(memory, size ? size : 1);
    free(buffer);
}

int main(int argc, char **argv)
{
    if (argc != 9)
        return 2;
    int disk = open(argv[8], O_WRONLY | O_DIRECT);
    if (disk < 0)
        return 1;
    load(now() + atof(argv[1]), atoi(argv[2]), atoi(argv[3]), atoi(argv[4]), disk);
    load(-1, atoi(argv[5]), atoi(argv[6]), atoi(argv[7]), disk);
}
