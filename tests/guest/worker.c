/* The guest's side of the soak: keeps state in RAM, on disks and in code that it rewrites, shows it, and spoils it.
 *
 * worker MIB DISK... speaks on stdin and stdout, one line each way:
 *   show            -> state ROUNDS RAM CODE DISK...
 *   work SEED PART  -> the same, then dirties PART per mille of its MIB, and everything else; then "dirty ROUNDS"
 *   random          -> random HEX: 32 bytes of getrandom(2)
 * All numbers but the arguments are hexadecimal.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

enum { PAGE = 4096, PATTERN = 1 << 20, BLOCKS = 256, MOST = 8 };

static uint64_t seed;
static unsigned rounds;
static unsigned char *pattern, *arena, *code, *block;
static size_t arena_pages;
static int disks[MOST], disk_count;

static uint64_t next(void) {
    seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
    return seed;
}

static uint64_t sum(uint64_t hash, const unsigned char *data, size_t size) {
    const uint64_t *words = (const uint64_t *)data;
    for (size_t i = 0; i < size / 8; i++) hash = (hash ^ words[i]) * 0x100000001b3ull;
    return hash;
}

static void fail(const char *what) {
    perror(what);
    exit(1);
}

/* mov eax, VALUE; ret: called after each change, so that a translation of it exists that a reset must throw away. */
static uint32_t rewrite(uint32_t value) {
    code[0] = 0xb8;
    memcpy(code + 1, &value, 4);
    code[5] = 0xc3;
    return ((uint32_t(*)(void))code)();
}

static void show(void) {
    printf("state %x %llx %x", rounds, (unsigned long long)sum(1, pattern, PATTERN), ((uint32_t(*)(void))code)());
    for (int d = 0; d < disk_count; d++) {
        uint64_t hash = 1;
        for (int i = 0; i < BLOCKS; i += 16) {
            if (pread(disks[d], block, 16 * PAGE, (off_t)i * PAGE) != 16 * PAGE) fail("read");
            hash = sum(hash, block, 16 * PAGE);
        }
        printf(" %llx", (unsigned long long)hash);
    }
    printf("\n");
    fflush(stdout);
}

static void work(uint64_t from, unsigned part) {
    seed = from | 1;
    show();
    for (size_t n = arena_pages * part / 1000; n > 0; n--) {
        uint64_t *page = (uint64_t *)(arena + next() % arena_pages * PAGE);
        for (int i = 0; i < 512; i += 64) page[i] = next();
    }
    for (int i = 0; i < 64; i++) pattern[next() % PATTERN] ^= (unsigned char)(next() | 1);
    rewrite((uint32_t)next());
    for (int d = 0; d < disk_count; d++)
        for (int i = 0; i < 16; i++) {
            for (int w = 0; w < PAGE / 8; w++) ((uint64_t *)block)[w] = next();
            if (pwrite(disks[d], block, PAGE, (off_t)(next() % BLOCKS) * PAGE) != PAGE) fail("write");
        }
    printf("dirty %x\n", ++rounds);
    fflush(stdout);
}

int main(int argc, char **argv) {
    arena_pages = (size_t)atol(argv[1]) << 8;
    arena = mmap(NULL, arena_pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    pattern = mmap(NULL, PATTERN, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    code = mmap(NULL, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    block = mmap(NULL, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (arena == MAP_FAILED || pattern == MAP_FAILED || code == MAP_FAILED || block == MAP_FAILED) fail("mmap");
    for (int i = 2; i < argc && disk_count < MOST; i++)
        if ((disks[disk_count++] = open(argv[i], O_RDWR | O_DIRECT)) < 0) fail(argv[i]);
    seed = 42;
    for (size_t i = 0; i < PATTERN; i++) pattern[i] = (unsigned char)next();
    rewrite(7);
    printf("ready\n");
    fflush(stdout);
    char line[128];
    while (fgets(line, sizeof line, stdin)) {
        unsigned long long from;
        unsigned part;
        if (sscanf(line, "work %llx %u", &from, &part) == 2) work(from, part);
        else if (!strncmp(line, "show", 4)) show();
        else if (!strncmp(line, "random", 6)) {
            unsigned char bytes[32];
            if (getrandom(bytes, sizeof bytes, 0) != sizeof bytes) fail("getrandom");
            printf("random ");
            for (unsigned i = 0; i < sizeof bytes; i++) printf("%02x", bytes[i]);
            printf("\n");
            fflush(stdout);
        }
    }
    return 0;
}
