"""Update rules, one file a method. Import the one you need: none pulls in another's packages."""
