#include "json.h"

#include <optional>
#include <set>
#include <vector>

#include <nlohmann/json.hpp>

namespace iq
{

Document::Document(std::string const& text, std::string const& where)
    : mWhere(where)
{
    std::vector<std::set<std::string>> keys;
    std::optional<std::string> twice;
    bool deep = false;
    Json::parser_callback_t const watch = [&](int depth, Json::parse_event_t event, Json& value) {
        bool const opens = event == Json::parse_event_t::object_start
            || event == Json::parse_event_t::array_start;
        deep |= opens && depth >= kDeepest;
        if (event == Json::parse_event_t::object_start)
        {
            keys.emplace_back();
        }
        else if (event == Json::parse_event_t::object_end)
        {
            keys.pop_back();
        }
        else if (event == Json::parse_event_t::key
            && !keys.back().insert(value.get<std::string>()).second)
        {
            twice = value.get<std::string>();
        }
        return true;
    };
    // The parser skips a byte order mark, and takes a NUL for the end: neither is JSON.
    bool const plain = text.find('\0') == std::string::npos && text.compare(0, 1, "\xef") != 0;
    mJson = std::make_unique<Json>(
        plain ? Json::parse(text, watch, false) : Json(Json::value_t::discarded));
    if (mJson->is_discarded())
    {
        throw Refusal(ErrorCode::kBundle, where + " is not JSON: compile the bundle again");
    }
    if (deep)
    {
        throw Refusal(ErrorCode::kBundle,
            where + " is damaged (it is more than " + std::to_string(kDeepest)
                + " levels deep): compile the bundle again");
    }
    if (twice)
    {
        throw Refusal(ErrorCode::kBundle,
            where + " is damaged (it has the key '" + *twice + "' twice): compile the bundle again");
    }
}

Document::~Document() = default;

Node Node::operator[](char const* key) const
{
    if (!has(key))
    {
        refuse(std::string("has no '") + key + "'");
    }
    return {mJson[key], mWhere + "." + key};
}

bool Node::has(char const* key) const
{
    if (!mJson.is_object())
    {
        refuse("is not an object");
    }
    return mJson.contains(key);
}

bool Node::isText() const noexcept
{
    return mJson.is_string();
}

bool Node::isList() const noexcept
{
    return mJson.is_array();
}

bool Node::isNull() const noexcept
{
    return mJson.is_null();
}

std::string const& Node::text() const
{
    if (!mJson.is_string())
    {
        refuse("is not a text");
    }
    return mJson.get_ref<std::string const&>();
}

int64_t Node::integer(int64_t low, int64_t high) const
{
    bool const fits = mJson.is_number_integer()
        && (!mJson.is_number_unsigned()
            || mJson.get<uint64_t>() <= static_cast<uint64_t>(INT64_MAX));
    int64_t const value = fits ? mJson.get<int64_t>() : 0;
    if (!fits || value < low || value > high)
    {
        refuse("is not an integer from " + std::to_string(low) + " to " + std::to_string(high));
    }
    return value;
}

bool Node::boolean() const
{
    if (!mJson.is_boolean())
    {
        refuse("is not true or false");
    }
    return mJson.get<bool>();
}

void Node::eachItem(std::function<void(Node const&)> const& visit) const
{
    if (!mJson.is_array())
    {
        refuse("is not a list");
    }
    for (size_t i = 0; i < mJson.size(); ++i)
    {
        visit({mJson[i], mWhere + "[" + std::to_string(i) + "]"});
    }
}

void Node::eachMember(std::function<void(std::string const&, Node const&)> const& visit) const
{
    if (!mJson.is_object())
    {
        refuse("is not an object");
    }
    for (auto const& item : mJson.items())
    {
        visit(item.key(), {item.value(), mWhere + "." + item.key()});
    }
}

void Node::refuse(std::string const& why) const
{
    throw Refusal(
        ErrorCode::kBundle, mWhere + " " + why + ": the file is damaged, compile the bundle again");
}

} // namespace iq
