/*
 * A simulated NVIDIA Management Library for the lab.
 *
 * It answers the calls that fleetfit makes through nvidia-ml-py from a profile file, so that the code under test is
 * the real NVML client. Structures and codes follow NVIDIA's public nvml.h; tests/integration/test_simulated_nvml.py
 * compares them with nvidia-ml-py. What is simulated: cards, memory, driver version, MIG, faults, and the memory that
 * a running fleetfit engine would hold (its planned bytes). Nothing here is ever a measurement.
 *
 * Environment (tests only): FLEETFIT_LAB_NVML_PROFILE names another profile file, FLEETFIT_LAB_ROOT is put in front of
 * /proc, /opt/fleetfit and /opt/fleetfit-lab.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define MIB (1024ULL * 1024ULL)

/* nvmlReturn_t */
enum {
    NVML_SUCCESS = 0,
    NVML_ERROR_UNINITIALIZED = 1,
    NVML_ERROR_INVALID_ARGUMENT = 2,
    NVML_ERROR_NOT_SUPPORTED = 3,
    NVML_ERROR_NO_PERMISSION = 4,
    NVML_ERROR_NOT_FOUND = 6,
    NVML_ERROR_INSUFFICIENT_SIZE = 7,
    NVML_ERROR_DRIVER_NOT_LOADED = 9,
    NVML_ERROR_GPU_IS_LOST = 15,
    NVML_ERROR_LIB_RM_VERSION_MISMATCH = 18,
    NVML_ERROR_ARGUMENT_VERSION_MISMATCH = 25,
    NVML_ERROR_UNKNOWN = 999,
    LAB_BROKEN_PROFILE = 998 /* not NVIDIA's: nvidia-ml-py asks nvmlErrorString for a code that it does not know */
};

#define VALUE_NOT_AVAILABLE UINT64_MAX /* NVML_VALUE_NOT_AVAILABLE for unsigned long long */
#define NO_INSTANCE 0xFFFFFFFFU        /* gpuInstanceId of a process outside MIG */

typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned int version; unsigned long long total, reserved, free, used; } MemoryV2;
typedef struct {
    char bus_id_legacy[16];
    unsigned int domain, bus, device, pci_device_id, pci_subsystem_id;
    char bus_id[32];
} PciInfo;
typedef struct {
    unsigned int pid;
    unsigned long long used_gpu_memory;
    unsigned int gpu_instance_id, compute_instance_id;
} ProcessInfo;
typedef struct {
    unsigned int multiprocessors, copy_engines, decoders, encoders, jpegs, ofas, gpu_instance_slices,
        compute_instance_slices;
    unsigned long long memory_size_mib;
} DeviceAttributes;
typedef struct { unsigned int version, value; } AddressingMode;

#define MAX_DEVICES 64
#define MAX_PROCESSES 64

typedef struct {
    unsigned int pid;
    unsigned long long used_bytes; /* VALUE_NOT_AVAILABLE where the driver does not tell */
    int graphics;
} Process;

typedef struct Device {
    char name[96], uuid[96], pci_bus_id[32], profile[32], serial[32];
    unsigned int pci_device, pci_subsystem;
    int cc_major, cc_minor;
    unsigned long long total_bytes, reserved_bytes, hidden_used_bytes;
    int memory_supported;      /* 0: both memory calls answer NOT_SUPPORTED (GB10, Jetson) */
    int display, persistence;
    int ecc;                   /* -1 not supported, 0 off, 1 on */
    int row_remap;             /* -1 not supported, 0 none, 1 pending, 2 failed */
    unsigned long long ecc_uncorrected, throttle;
    int virtualization;        /* nvmlGpuVirtualizationMode_t */
    int addressing;            /* -1 not supported, 0 none, 1 HMM, 2 ATS */
    int mig;                   /* -1 not supported, 0 off, 1 on */
    char nvlink_to[32];        /* PCI bus id of the peer, or empty */
    int fault;                 /* an nvmlReturn_t that this device's calls answer with */
    int parent;                /* index of the parent device for a MIG instance, else -1 */
    unsigned int gpu_instance, slices;
    Process processes[MAX_PROCESSES];
    int n_processes;
} Device;

static Device devices[MAX_DEVICES];
static int n_devices;
static int initialized;
static char driver_version[80];
static int cuda_version;
static int init_fault;
static int init_hangs, init_crashes;
static char broken_profile[4200];

/* ---- the profile ------------------------------------------------------------------------------------------------ */

static const char *lab_root(void)
{
    const char *root = getenv("FLEETFIT_LAB_ROOT");
    return root ? root : "";
}

static void set_text(char *to, size_t size, const char *from)
{
    size_t length = strnlen(from, size - 1);
    memmove(to, from, length);
    to[length] = '\0';
}

static char *trim(char *text)
{
    while (isspace((unsigned char)*text))
        text++;
    char *end = text + strlen(text);
    while (end > text && isspace((unsigned char)end[-1]))
        *--end = '\0';
    return text;
}

static int choice(const char *value, const char *const *names, const int *numbers)
{
    for (int i = 0; names[i]; i++)
        if (!strcmp(value, names[i]))
            return numbers[i];
    return numbers[0];
}

static int fault_code(const char *value)
{
    static const char *const names[] = {"none", "lost", "no_permission", "library_mismatch", "not_loaded", "unknown", NULL};
    static const int numbers[] = {NVML_SUCCESS, NVML_ERROR_GPU_IS_LOST, NVML_ERROR_NO_PERMISSION,
                                  NVML_ERROR_LIB_RM_VERSION_MISMATCH, NVML_ERROR_DRIVER_NOT_LOADED, NVML_ERROR_UNKNOWN};
    return choice(value, names, numbers);
}

static int tristate(const char *value)
{
    static const char *const names[] = {"not_supported", "off", "on", NULL};
    static const int numbers[] = {-1, 0, 1};
    return choice(value, names, numbers);
}

static int set_driver(const char *key, const char *value)
{
    if (!strcmp(key, "version"))
        set_text(driver_version, sizeof driver_version, value);
    else if (!strcmp(key, "cuda_version")) {
        int major = 0, minor = 0;
        sscanf(value, "%d.%d", &major, &minor);
        cuda_version = major * 1000 + minor * 10;
    } else if (!strcmp(key, "fault")) {
        init_hangs = !strcmp(value, "hang");
        init_crashes = !strcmp(value, "crash");
        init_fault = fault_code(value);
    } else
        return 0;
    return 1;
}

static int set_device(Device *d, const char *key, const char *value)
{
    if (!strcmp(key, "name")) set_text(d->name, sizeof d->name, value);
    else if (!strcmp(key, "uuid")) set_text(d->uuid, sizeof d->uuid, value);
    else if (!strcmp(key, "serial")) set_text(d->serial, sizeof d->serial, value);
    else if (!strcmp(key, "pci_bus_id")) set_text(d->pci_bus_id, sizeof d->pci_bus_id, value);
    else if (!strcmp(key, "pci_device_id")) {
        unsigned int vendor = 0, device = 0;
        sscanf(value, "%x:%x", &vendor, &device);
        d->pci_device = device << 16 | vendor;
    } else if (!strcmp(key, "compute_capability")) sscanf(value, "%d.%d", &d->cc_major, &d->cc_minor);
    else if (!strcmp(key, "memory_total_mib")) d->total_bytes = strtoull(value, NULL, 10) * MIB;
    else if (!strcmp(key, "memory_reserved_mib")) d->reserved_bytes = strtoull(value, NULL, 10) * MIB;
    else if (!strcmp(key, "hidden_used_mib")) d->hidden_used_bytes = strtoull(value, NULL, 10) * MIB;
    else if (!strcmp(key, "memory")) d->memory_supported = strcmp(value, "not_supported") != 0;
    else if (!strcmp(key, "display")) d->display = atoi(value);
    else if (!strcmp(key, "persistence")) d->persistence = atoi(value);
    else if (!strcmp(key, "ecc")) d->ecc = tristate(value);
    else if (!strcmp(key, "ecc_uncorrected")) d->ecc_uncorrected = strtoull(value, NULL, 10);
    else if (!strcmp(key, "throttle")) d->throttle = strtoull(value, NULL, 0);
    else if (!strcmp(key, "row_remap")) {
        static const char *const names[] = {"not_supported", "none", "pending", "failed", NULL};
        static const int numbers[] = {-1, 0, 1, 2};
        d->row_remap = choice(value, names, numbers);
    } else if (!strcmp(key, "virtualization")) {
        static const char *const names[] = {"none", "passthrough", "vgpu", NULL};
        static const int numbers[] = {0, 1, 2};
        d->virtualization = choice(value, names, numbers);
    } else if (!strcmp(key, "addressing")) {
        static const char *const names[] = {"not_supported", "none", "hmm", "ats", NULL};
        static const int numbers[] = {-1, 0, 1, 2};
        d->addressing = choice(value, names, numbers);
    } else if (!strcmp(key, "mig")) d->mig = tristate(value);
    else if (!strcmp(key, "nvlink_to")) set_text(d->nvlink_to, sizeof d->nvlink_to, value);
    else if (!strcmp(key, "fault")) d->fault = fault_code(value);
    else if (!strcmp(key, "profile")) set_text(d->profile, sizeof d->profile, value);
    else if (!strcmp(key, "gpu_instance")) d->gpu_instance = (unsigned)atoi(value);
    else if (!strcmp(key, "slices")) d->slices = (unsigned)atoi(value);
    else return 0;
    return 1;
}

static int set_process(Process *p, const char *key, const char *value)
{
    if (!strcmp(key, "pid")) p->pid = (unsigned)atoi(value);
    else if (!strcmp(key, "used_mib"))
        p->used_bytes = !strcmp(value, "not_available") ? VALUE_NOT_AVAILABLE : strtoull(value, NULL, 10) * MIB;
    else if (!strcmp(key, "kind")) p->graphics = !strcmp(value, "graphics");
    else return 0;
    return 1;
}

static Device *new_device(int parent)
{
    if (n_devices == MAX_DEVICES)
        return NULL;
    Device *d = &devices[n_devices++];
    memset(d, 0, sizeof *d);
    d->parent = parent;
    d->memory_supported = d->persistence = 1;
    d->ecc = d->row_remap = d->addressing = d->mig = -1;
    if (parent >= 0) {
        Device *whole = &devices[parent];
        set_text(d->pci_bus_id, sizeof d->pci_bus_id, whole->pci_bus_id);
        d->pci_device = whole->pci_device;
        d->cc_major = whole->cc_major;
        d->cc_minor = whole->cc_minor;
    }
    return d;
}

static int read_profile(void)
{
    char path[4096];
    const char *named = getenv("FLEETFIT_LAB_NVML_PROFILE");
    if (named)
        set_text(path, sizeof path, named);
    else
        snprintf(path, sizeof path, "%s/opt/fleetfit-lab/profile.ini", lab_root());
    n_devices = 0;
    init_fault = init_hangs = init_crashes = cuda_version = 0;
    driver_version[0] = '\0';
    FILE *file = fopen(path, "re");
    if (!file)
        return NVML_ERROR_DRIVER_NOT_LOADED;

    enum { NONE, DRIVER, DEVICE, PROCESS } section = NONE;
    Device *device = NULL;
    Process *process = NULL;
    int gpu = -1;
    char line[1024];
    int number = 0, understood = 1;
    while (understood && fgets(line, sizeof line, file)) {
        number++;
        char *text = trim(line);
        if (!*text || *text == '#')
            continue;
        if (*text == '[') {
            section = NONE;
            if (!strcmp(text, "[driver]")) section = DRIVER;
            else if (!strcmp(text, "[gpu]") && (device = new_device(-1))) {
                gpu = (int)(device - devices);
                section = DEVICE;
            } else if (!strcmp(text, "[mig]") && gpu >= 0 && (device = new_device(gpu)))
                section = DEVICE;
            else if (!strcmp(text, "[process]") && device && device->n_processes < MAX_PROCESSES) {
                process = &device->processes[device->n_processes++];
                memset(process, 0, sizeof *process);
                section = PROCESS;
            }
            understood = section != NONE;
            continue;
        }
        char *equals = strchr(text, '=');
        understood = equals && section != NONE;
        if (!understood)
            break;
        *equals = '\0';
        char *key = trim(text), *value = trim(equals + 1);
        understood = section == DRIVER   ? set_driver(key, value)
                     : section == DEVICE ? set_device(device, key, value)
                                         : set_process(process, key, value);
    }
    fclose(file);
    if (understood)
        return NVML_SUCCESS;
    snprintf(broken_profile, sizeof broken_profile, "line %d of the simulated GPU profile %s is not understood", number,
             path);
    return LAB_BROKEN_PROFILE;
}

/* ---- a small JSON reader: enough for plan.json ------------------------------------------------------------------- */

typedef struct Json {
    enum { J_OTHER, J_NUMBER, J_STRING, J_ARRAY, J_OBJECT } type;
    double number;
    char *text;              /* a string's value, escapes left as they are: our ids have none */
    char *key;               /* where the parent is an object */
    struct Json *child, *next;
} Json;

static void json_free(Json *j)
{
    while (j) {
        Json *next = j->next;
        json_free(j->child);
        free(j->text);
        free(j->key);
        free(j);
        j = next;
    }
}

static const char *skip_space(const char *s) { return s + strspn(s, " \t\r\n"); }

static const char *json_string(const char *s, char **out)
{
    const char *start = ++s;
    while (*s && *s != '"')
        s += *s == '\\' && s[1] ? 2 : 1;
    if (*s != '"')
        return NULL;
    *out = strndup(start, (size_t)(s - start));
    return s + 1;
}

static const char *json_value(const char *s, Json *out, int depth);

static const char *json_members(const char *s, Json *out, int depth, int object)
{
    char close = object ? '}' : ']';
    Json **tail = &out->child;
    s = skip_space(s + 1);
    if (*s == close)
        return s + 1;
    for (;;) {
        Json *item = calloc(1, sizeof *item);
        if (!item)
            return NULL;
        *tail = item;
        tail = &item->next;
        if (object) {
            s = skip_space(s);
            if (*s != '"' || !(s = json_string(s, &item->key)))
                return NULL;
            s = skip_space(s);
            if (*s++ != ':')
                return NULL;
        }
        if (!(s = json_value(s, item, depth + 1)))
            return NULL;
        s = skip_space(s);
        if (*s == close)
            return s + 1;
        if (*s++ != ',')
            return NULL;
    }
}

static const char *json_value(const char *s, Json *out, int depth)
{
    if (depth > 64)
        return NULL;
    s = skip_space(s);
    if (*s == '{') { out->type = J_OBJECT; return json_members(s, out, depth, 1); }
    if (*s == '[') { out->type = J_ARRAY; return json_members(s, out, depth, 0); }
    if (*s == '"') { out->type = J_STRING; return json_string(s, &out->text); }
    if (*s == '-' || isdigit((unsigned char)*s)) {
        char *end;
        out->type = J_NUMBER;
        out->number = strtod(s, &end);
        return end;
    }
    size_t word = strspn(s, "aeflnrstu"); /* true, false, null */
    return word ? s + word : NULL;
}

static const Json *json_get(const Json *object, const char *key)
{
    if (object)
        for (const Json *j = object->child; j; j = j->next)
            if (j->key && !strcmp(j->key, key))
                return j;
    return NULL;
}

static Json *json_file(const char *path)
{
    FILE *file = fopen(path, "re");
    if (!file)
        return NULL;
    size_t room = 4 * MIB, n;
    char *text = malloc(room + 1);
    Json *root = calloc(1, sizeof *root);
    if (text && root) {
        n = fread(text, 1, room, file);
        text[n] = '\0';
        if (!json_value(text, root, 0)) {
            json_free(root);
            root = NULL;
        }
    }
    free(text);
    fclose(file);
    return root;
}

/* ---- what a running engine of ours holds ------------------------------------------------------------------------- */

static const char *const services[] = {"llama-server", "vllm"};

static int file_mentions(const char *path, const char *word)
{
    char text[8192];
    FILE *file = fopen(path, "re");
    if (!file)
        return 0;
    size_t n = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[n] = '\0';
    size_t length = strlen(word);
    for (char *hit = text; (hit = strstr(hit, word)); hit++)
        if (hit[length] == '\n' || hit[length] == '/' || hit[length] == '\0')
            return 1;
    return 0;
}

/* The lowest pid in the service's cgroup, or 0. A zombie (empty cmdline) holds nothing. */
static unsigned int service_pid(const char *service)
{
    char path[4096], unit[64];
    snprintf(unit, sizeof unit, "/%s.service", service);
    snprintf(path, sizeof path, "%s/proc", lab_root());
    DIR *proc = opendir(path);
    if (!proc)
        return 0;
    unsigned int best = 0;
    struct dirent *entry;
    while ((entry = readdir(proc))) {
        unsigned int pid = (unsigned)atoi(entry->d_name);
        if (!pid || (best && pid > best))
            continue;
        snprintf(path, sizeof path, "%s/proc/%u/cgroup", lab_root(), pid);
        if (!file_mentions(path, unit))
            continue;
        snprintf(path, sizeof path, "%s/proc/%u/cmdline", lab_root(), pid);
        FILE *cmdline = fopen(path, "re");
        if (cmdline) {
            int first = fgetc(cmdline);
            fclose(cmdline);
            if (first == EOF)
                continue;
        }
        best = pid;
    }
    closedir(proc);
    return best;
}

/* The device's part of a plan: weights, kv_cache, compute and overhead; the margin is not held by anyone. */
static unsigned long long planned_bytes(const Json *plan, const char *uuid)
{
    static const char *const terms[] = {"weights", "kv_cache", "compute", "overhead"};
    const Json *deployments = json_get(plan, "deployments");
    const Json *deployment = deployments ? deployments->child : plan;
    unsigned long long bytes = 0;
    for (; deployment; deployment = deployments ? deployment->next : NULL) {
        const Json *list = json_get(deployment, "devices");
        for (const Json *device = list ? list->child : NULL; device; device = device->next) {
            const Json *id = json_get(device, "id");
            if (!id || id->type != J_STRING || strcmp(id->text, uuid))
                continue;
            const Json *nested = json_get(device, "memory_bytes");
            for (int i = 0; i < 4; i++) {
                const Json *term = json_get(nested && nested->type == J_OBJECT ? nested : device, terms[i]);
                if (term && term->type == J_NUMBER && term->number > 0)
                    bytes += (unsigned long long)term->number;
            }
        }
    }
    return bytes;
}

/* Fill `out` with the device's processes (the profile's and our engines'), at most MAX_PROCESSES. */
static int device_processes(const Device *d, Process *out)
{
    int n = d->n_processes;
    memcpy(out, d->processes, sizeof *out * (size_t)n);
    for (size_t i = 0; i < sizeof services / sizeof *services && n < MAX_PROCESSES; i++) {
        char path[4096];
        snprintf(path, sizeof path, "%s/opt/fleetfit/%s/current/plan.json", lab_root(), services[i]);
        if (access(path, R_OK))
            continue;
        unsigned int pid = service_pid(services[i]);
        if (!pid)
            continue;
        Json *plan = json_file(path);
        unsigned long long bytes = planned_bytes(plan, d->uuid);
        json_free(plan);
        if (bytes)
            out[n++] = (Process){.pid = pid, .used_bytes = bytes};
    }
    return n;
}

static unsigned long long used_bytes(const Device *d)
{
    Process list[MAX_PROCESSES];
    unsigned long long used = d->hidden_used_bytes;
    int n = device_processes(d, list);
    for (int i = 0; i < n; i++)
        if (list[i].used_bytes != VALUE_NOT_AVAILABLE)
            used += list[i].used_bytes;
    int self = (int)(d - devices);
    for (int i = 0; i < n_devices; i++)
        if (devices[i].parent == self)
            used += used_bytes(&devices[i]);
    unsigned long long room = d->total_bytes - d->reserved_bytes;
    return used < room ? used : room;
}

/* ---- NVML ---------------------------------------------------------------------------------------------------------- */

static int is_device(const void *handle)
{
    const char *at = handle, *first = (const char *)devices;
    return at >= first && at < (const char *)(devices + n_devices) && (size_t)(at - first) % sizeof *devices == 0;
}

#define CHECK(handle, out)                                                                                             \
    do {                                                                                                               \
        if (!initialized)                                                                                              \
            return NVML_ERROR_UNINITIALIZED;                                                                           \
        if (!is_device(handle) || !(out))                                                                              \
            return NVML_ERROR_INVALID_ARGUMENT;                                                                        \
        if ((handle)->fault)                                                                                           \
            return (handle)->fault;                                                                                    \
    } while (0)

EXPORT int nvmlInitWithFlags(unsigned int flags)
{
    (void)flags;
    int rc = read_profile();
    if (rc)
        return rc;
    if (init_crashes)
        abort();
    while (init_hangs)
        sleep(3600);
    if (init_fault)
        return init_fault;
    initialized++;
    return NVML_SUCCESS;
}

EXPORT int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

EXPORT int nvmlShutdown(void)
{
    if (!initialized)
        return NVML_ERROR_UNINITIALIZED;
    initialized--;
    return NVML_SUCCESS;
}

EXPORT const char *nvmlErrorString(int code)
{
    static char text[32];
    if (code == LAB_BROKEN_PROFILE)
        return broken_profile;
    snprintf(text, sizeof text, "Error %d", code);
    return code ? text : "Success";
}

static int copy_text(char *to, unsigned int size, const char *from)
{
    if (!to)
        return NVML_ERROR_INVALID_ARGUMENT;
    if (strlen(from) + 1 > size)
        return NVML_ERROR_INSUFFICIENT_SIZE;
    strcpy(to, from);
    return NVML_SUCCESS;
}

EXPORT int nvmlSystemGetDriverVersion(char *version, unsigned int length)
{
    return initialized ? copy_text(version, length, driver_version) : NVML_ERROR_UNINITIALIZED;
}

EXPORT int nvmlSystemGetNVMLVersion(char *version, unsigned int length)
{
    char text[96];
    snprintf(text, sizeof text, "%d.%.79s", cuda_version / 1000, driver_version);
    return copy_text(version, length, text);
}

EXPORT int nvmlSystemGetCudaDriverVersion_v2(int *version)
{
    if (!version)
        return NVML_ERROR_INVALID_ARGUMENT;
    *version = cuda_version;
    return NVML_SUCCESS;
}

EXPORT int nvmlSystemGetCudaDriverVersion(int *version) { return nvmlSystemGetCudaDriverVersion_v2(version); }

EXPORT int nvmlSystemGetProcessName(unsigned int pid, char *name, unsigned int length)
{
    char path[4096], text[1024];
    snprintf(path, sizeof path, "%s/proc/%u/cmdline", lab_root(), pid);
    FILE *file = fopen(path, "re");
    if (!file)
        return NVML_ERROR_NOT_FOUND;
    size_t n = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[n] = '\0';
    return copy_text(name, length, text);
}

static Device *gpu_at(unsigned int index, int parent)
{
    for (int i = 0; i < n_devices; i++)
        if (devices[i].parent == parent && index-- == 0)
            return &devices[i];
    return NULL;
}

EXPORT int nvmlDeviceGetCount_v2(unsigned int *count)
{
    if (!initialized)
        return NVML_ERROR_UNINITIALIZED;
    if (!count)
        return NVML_ERROR_INVALID_ARGUMENT;
    *count = 0;
    while (gpu_at(*count, -1))
        ++*count;
    return NVML_SUCCESS;
}

EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned int index, Device **device)
{
    if (!initialized)
        return NVML_ERROR_UNINITIALIZED;
    Device *found = gpu_at(index, -1);
    if (!found || !device)
        return NVML_ERROR_INVALID_ARGUMENT;
    /* The real driver refuses the handle itself where the card is gone or closed to the caller. */
    if (found->fault == NVML_ERROR_GPU_IS_LOST || found->fault == NVML_ERROR_NO_PERMISSION)
        return found->fault;
    *device = found;
    return NVML_SUCCESS;
}

EXPORT int nvmlDeviceGetHandleByUUID(const char *uuid, Device **device)
{
    if (!initialized)
        return NVML_ERROR_UNINITIALIZED;
    if (!uuid || !device)
        return NVML_ERROR_INVALID_ARGUMENT;
    for (int i = 0; i < n_devices; i++)
        if (!strcmp(devices[i].uuid, uuid)) {
            if (devices[i].fault == NVML_ERROR_GPU_IS_LOST || devices[i].fault == NVML_ERROR_NO_PERMISSION)
                return devices[i].fault;
            *device = &devices[i];
            return NVML_SUCCESS;
        }
    return NVML_ERROR_NOT_FOUND;
}

EXPORT int nvmlDeviceGetName(Device *device, char *name, unsigned int length)
{
    CHECK(device, name);
    if (device->parent >= 0 && !device->name[0]) {
        char text[160];
        snprintf(text, sizeof text, "%s MIG %s", devices[device->parent].name, device->profile);
        return copy_text(name, length, text);
    }
    return copy_text(name, length, device->name);
}

EXPORT int nvmlDeviceGetUUID(Device *device, char *uuid, unsigned int length)
{
    CHECK(device, uuid);
    return copy_text(uuid, length, device->uuid);
}

EXPORT int nvmlDeviceGetSerial(Device *device, char *serial, unsigned int length)
{
    CHECK(device, serial);
    return device->serial[0] ? copy_text(serial, length, device->serial) : NVML_ERROR_NOT_SUPPORTED;
}

static void fill_pci(const Device *d, PciInfo *info)
{
    memset(info, 0, sizeof *info);
    sscanf(d->pci_bus_id, "%x:%x:%x", &info->domain, &info->bus, &info->device);
    snprintf(info->bus_id, sizeof info->bus_id, "%08X:%02X:%02X.0", info->domain, info->bus, info->device);
    snprintf(info->bus_id_legacy, sizeof info->bus_id_legacy, "%04X:%02X:%02X.0", info->domain & 0xffff,
             info->bus & 0xff, info->device & 0xff);
    info->pci_device_id = d->pci_device;
    info->pci_subsystem_id = d->pci_subsystem;
}

EXPORT int nvmlDeviceGetPciInfo_v3(Device *device, PciInfo *info)
{
    CHECK(device, info);
    fill_pci(device, info);
    return NVML_SUCCESS;
}

EXPORT int nvmlDeviceGetCudaComputeCapability(Device *device, int *major, int *minor)
{
    CHECK(device, major && minor);
    *major = device->cc_major;
    *minor = device->cc_minor;
    return NVML_SUCCESS;
}

EXPORT int nvmlDeviceGetMemoryInfo(Device *device, Memory *memory)
{
    CHECK(device, memory);
    if (!device->memory_supported)
        return NVML_ERROR_NOT_SUPPORTED;
    memory->total = device->total_bytes;
    memory->used = used_bytes(device) + device->reserved_bytes; /* version 1 counts reserved memory as used */
    memory->free = memory->total - memory->used;
    return NVML_SUCCESS;
}

#ifndef NVML_MEMORY_V1_ONLY /* as before driver 510 */
EXPORT int nvmlDeviceGetMemoryInfo_v2(Device *device, MemoryV2 *memory)
{
    CHECK(device, memory);
    if (memory->version != (2U << 24 | sizeof *memory))
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    if (!device->memory_supported)
        return NVML_ERROR_NOT_SUPPORTED;
    memory->total = device->total_bytes;
    memory->reserved = device->reserved_bytes;
    memory->used = used_bytes(device);
    memory->free = memory->total - memory->reserved - memory->used;
    return NVML_SUCCESS;
}
#endif

static int running_processes(Device *device, unsigned int *count, ProcessInfo *infos, int graphics)
{
    CHECK(device, count);
    Process list[MAX_PROCESSES];
    int n = device_processes(device, list);
    unsigned int wanted = 0;
    for (int i = 0; i < n; i++)
        wanted += list[i].graphics == graphics;
    if (wanted > *count) {
        *count = wanted;
        return NVML_ERROR_INSUFFICIENT_SIZE;
    }
    *count = wanted;
    for (int i = 0, at = 0; i < n && infos; i++)
        if (list[i].graphics == graphics)
            infos[at++] = (ProcessInfo){.pid = list[i].pid,
                                        .used_gpu_memory = list[i].used_bytes,
                                        .gpu_instance_id = device->parent >= 0 ? device->gpu_instance : NO_INSTANCE,
                                        .compute_instance_id = device->parent >= 0 ? 0 : NO_INSTANCE};
    return NVML_SUCCESS;
}

EXPORT int nvmlDeviceGetComputeRunningProcesses_v3(Device *device, unsigned int *count, ProcessInfo *infos)
{
    return running_processes(device, count, infos, 0);
}

EXPORT int nvmlDeviceGetGraphicsRunningProcesses_v3(Device *device, unsigned int *count, ProcessInfo *infos)
{
    return running_processes(device, count, infos, 1);
}

#define INT_GETTER(function, type, supported, value)                                                                   \
    EXPORT int function(Device *device, type *out)                                                                     \
    {                                                                                                                  \
        CHECK(device, out);                                                                                            \
        if (!(supported))                                                                                              \
            return NVML_ERROR_NOT_SUPPORTED;                                                                           \
        *out = (type)(value);                                                                                          \
        return NVML_SUCCESS;                                                                                           \
    }

INT_GETTER(nvmlDeviceGetDisplayActive, int, 1, device->display)
INT_GETTER(nvmlDeviceGetDisplayMode, int, 1, 1) /* a real H100 says 1 without any display: not used */
INT_GETTER(nvmlDeviceGetPersistenceMode, int, device->parent < 0, device->persistence)
INT_GETTER(nvmlDeviceGetCurrentClocksThrottleReasons, unsigned long long, device->parent < 0, device->throttle)
INT_GETTER(nvmlDeviceGetCurrentClocksEventReasons, unsigned long long, device->parent < 0, device->throttle)
INT_GETTER(nvmlDeviceGetVirtualizationMode, unsigned int, device->parent < 0, device->virtualization)
INT_GETTER(nvmlDeviceGetMaxMigDeviceCount, unsigned int, 1, device->mig == 1 ? 7 : 0)
INT_GETTER(nvmlDeviceIsMigDeviceHandle, unsigned int, 1, device->parent >= 0)
INT_GETTER(nvmlDeviceGetMinorNumber, unsigned int, device->parent < 0, device - devices)

EXPORT int nvmlDeviceGetGpuInstanceId(Device *device, unsigned int *id)
{
    CHECK(device, id);
    if (device->parent < 0)
        return NVML_ERROR_INVALID_ARGUMENT;
    *id = device->gpu_instance;
    return NVML_SUCCESS;
}

EXPORT int nvmlDeviceGetComputeInstanceId(Device *device, unsigned int *id)
{
    CHECK(device, id);
    if (device->parent < 0)
        return NVML_ERROR_INVALID_ARGUMENT;
    *id = 0;
    return NVML_SUCCESS;
}

EXPORT int nvmlDeviceGetEccMode(Device *device, int *current, int *pending)
{
    CHECK(device, current && pending);
    if (device->ecc < 0)
        return NVML_ERROR_NOT_SUPPORTED;
    *current = *pending = device->ecc;
    return NVML_SUCCESS;
}

EXPORT int nvmlDeviceGetTotalEccErrors(Device *device, int error_type, int counter_type, unsigned long long *count)
{
    (void)counter_type;
    CHECK(device, count);
    if (device->ecc != 1)
        return NVML_ERROR_NOT_SUPPORTED;
    *count = error_type == 1 ? device->ecc_uncorrected : 0; /* 1: NVML_MEMORY_ERROR_TYPE_UNCORRECTED */
    return NVML_SUCCESS;
}

EXPORT int nvmlDeviceGetRemappedRows(Device *device, unsigned int *corrected, unsigned int *uncorrected,
                                     unsigned int *pending, unsigned int *failed)
{
    CHECK(device, corrected && uncorrected && pending && failed);
    if (device->row_remap < 0)
        return NVML_ERROR_NOT_SUPPORTED;
    *corrected = 0;
    *uncorrected = device->row_remap > 0;
    *pending = device->row_remap == 1;
    *failed = device->row_remap == 2;
    return NVML_SUCCESS;
}

EXPORT int nvmlDeviceGetAddressingMode(Device *device, AddressingMode *mode)
{
    CHECK(device, mode);
    if (mode->version != (1U << 24 | sizeof *mode))
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    if (device->addressing < 0)
        return NVML_ERROR_NOT_SUPPORTED;
    mode->value = (unsigned)device->addressing;
    return NVML_SUCCESS;
}

EXPORT int nvmlDeviceGetMigMode(Device *device, unsigned int *current, unsigned int *pending)
{
    CHECK(device, current && pending);
    if (device->mig < 0)
        return NVML_ERROR_NOT_SUPPORTED;
    *current = *pending = (unsigned)device->mig;
    return NVML_SUCCESS;
}

EXPORT int nvmlDeviceGetMigDeviceHandleByIndex(Device *device, unsigned int index, Device **instance)
{
    CHECK(device, instance);
    if (device->mig < 0)
        return NVML_ERROR_NOT_SUPPORTED;
    if (index >= 7)
        return NVML_ERROR_INVALID_ARGUMENT;
    Device *found = gpu_at(index, (int)(device - devices));
    if (!found)
        return NVML_ERROR_NOT_FOUND;
    *instance = found;
    return NVML_SUCCESS;
}

EXPORT int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(Device *instance, Device **device)
{
    CHECK(instance, device);
    if (instance->parent < 0)
        return NVML_ERROR_INVALID_ARGUMENT;
    *device = &devices[instance->parent];
    return NVML_SUCCESS;
}

EXPORT int nvmlDeviceGetAttributes_v2(Device *device, DeviceAttributes *attributes)
{
    CHECK(device, attributes);
    if (device->parent < 0)
        return NVML_ERROR_NOT_SUPPORTED;
    memset(attributes, 0, sizeof *attributes);
    attributes->gpu_instance_slices = attributes->compute_instance_slices = device->slices;
    attributes->memory_size_mib = device->total_bytes / MIB;
    return NVML_SUCCESS;
}

EXPORT int nvmlDeviceGetNvLinkState(Device *device, unsigned int link, unsigned int *active)
{
    CHECK(device, active);
    if (!device->nvlink_to[0])
        return NVML_ERROR_NOT_SUPPORTED;
    if (link >= 4)
        return NVML_ERROR_INVALID_ARGUMENT;
    *active = 1;
    return NVML_SUCCESS;
}

EXPORT int nvmlDeviceGetNvLinkRemotePciInfo_v2(Device *device, unsigned int link, PciInfo *info)
{
    CHECK(device, info);
    if (!device->nvlink_to[0] || link >= 4)
        return NVML_ERROR_INVALID_ARGUMENT;
    for (int i = 0; i < n_devices; i++)
        if (devices[i].parent < 0 && !strcmp(devices[i].pci_bus_id, device->nvlink_to)) {
            fill_pci(&devices[i], info);
            return NVML_SUCCESS;
        }
    return NVML_ERROR_NOT_FOUND;
}

EXPORT int nvmlDeviceGetTopologyCommonAncestor(Device *a, Device *b, unsigned int *level)
{
    CHECK(a, level);
    CHECK(b, level);
    *level = 30; /* NVML_TOPOLOGY_HOSTBRIDGE */
    return NVML_SUCCESS;
}
