#include "files.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <memory>
#include <vector>

#include <fcntl.h>
#include <openssl/evp.h>
#include <sys/stat.h>

#include "refusal.h"

namespace iq
{
namespace
{

constexpr uint64_t kChunk = uint64_t{1} << 20;

int openRetrying(int folder, char const* name, int flags) noexcept
{
    int fd = -1;
    do
    {
        fd = ::openat(folder, name, flags | O_RDONLY | O_CLOEXEC);
    } while (fd < 0 && errno == EINTR);
    return fd;
}

std::string whatIsThere(int error)
{
    switch (error)
    {
    case ENOENT: return "missing";
    case ELOOP: return "a symbolic link";
    case ENOTDIR: return "a file or a symbolic link on the way to it";
    default: return std::string("cannot be opened: ") + std::strerror(error);
    }
}

FileDescriptor openBelow(FileDescriptor const& folder, std::string const& name, std::string& found)
{
    FileDescriptor above;
    int at = folder.get();
    size_t start = 0;
    for (size_t end = name.find('/'); end != std::string::npos; end = name.find('/', start))
    {
        std::string const part = name.substr(start, end - start);
        FileDescriptor below(openRetrying(at, part.c_str(), O_DIRECTORY | O_NOFOLLOW));
        if (below.get() < 0)
        {
            found = whatIsThere(errno);
            return {};
        }
        above = std::move(below);
        at = above.get();
        start = end + 1;
    }
    // O_NONBLOCK: a pipe in place of the file must not hold us.
    FileDescriptor file(openRetrying(at, name.c_str() + start, O_NOFOLLOW | O_NONBLOCK));
    if (file.get() < 0)
    {
        found = whatIsThere(errno);
        return {};
    }
    struct stat facts = {};
    if (::fstat(file.get(), &facts) != 0 || !S_ISREG(facts.st_mode))
    {
        found = S_ISDIR(facts.st_mode) ? "a folder" : "not a regular file";
        return {};
    }
    return file;
}

} // namespace

FileDescriptor openFolder(std::string const& folder)
{
    FileDescriptor result(openRetrying(AT_FDCWD, folder.c_str(), O_DIRECTORY));
    if (result.get() < 0 || folder.find('\0') != std::string::npos)
    {
        throw Refusal(ErrorCode::kBundle,
            folder + " is not a folder that can be read: give the output folder of a compile");
    }
    return result;
}

FileDescriptor openFile(FileDescriptor const& folder, std::string const& name, std::string& found)
{
    FileDescriptor ahead = openBelow(folder, kAhead + name, found);
    return ahead.get() >= 0 ? std::move(ahead) : openBelow(folder, name, found);
}

bool liesAhead(FileDescriptor const& folder, std::string const& name)
{
    std::string found;
    return openBelow(folder, kAhead + name, found).get() >= 0;
}

uint64_t sizeOf(FileDescriptor const& file) noexcept
{
    struct stat facts = {};
    return ::fstat(file.get(), &facts) == 0 ? static_cast<uint64_t>(facts.st_size) : 0;
}

std::string hashFile(
    FileDescriptor const& file, std::string const& name, uint64_t limit, std::string* content)
{
    std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> const context(
        EVP_MD_CTX_new(), &EVP_MD_CTX_free);
    bool good = context && EVP_DigestInit_ex(context.get(), EVP_sha256(), nullptr) == 1;
    std::vector<char> chunk(std::min(kChunk, limit + 1));
    uint64_t total = 0;
    while (good && total <= limit)
    {
        ssize_t const got = ::read(file.get(), chunk.data(), chunk.size());
        if (got < 0 && errno == EINTR)
        {
            continue;
        }
        if (got < 0)
        {
            throw Refusal(
                ErrorCode::kBundle, "cannot read " + name + ": " + std::strerror(errno));
        }
        if (got == 0)
        {
            break;
        }
        total += static_cast<uint64_t>(got);
        good = EVP_DigestUpdate(context.get(), chunk.data(), static_cast<size_t>(got)) == 1;
        if (content != nullptr)
        {
            content->append(chunk.data(), static_cast<size_t>(got));
        }
    }
    std::array<unsigned char, EVP_MAX_MD_SIZE> digest{};
    unsigned int length = 0;
    if (!good || EVP_DigestFinal_ex(context.get(), digest.data(), &length) != 1)
    {
        throw Refusal(ErrorCode::kOther, "OpenSSL gives no SHA-256 here");
    }
    std::string hex;
    for (unsigned int i = 0; i < length; ++i)
    {
        constexpr char const* kDigits = "0123456789abcdef";
        hex += kDigits[digest[i] >> 4U];
        hex += kDigits[digest[i] & 15U];
    }
    return hex;
}

} // namespace iq
